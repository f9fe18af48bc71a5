// CPU tensors in, the torch-free kernels underneath, torch's own thread pool across rows and across columns.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <vector>

#include "../jobs/koleo.h"
#include "rows.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void koleo_panel_cpu(Tensor tile, Tensor best, Tensor neighbor, int64_t first_row, int64_t first_col) {
  const auto panel = sslk::koleo_job(tile, best, neighbor, first_row, first_col);
  const sslk::Isa isa = sslk::active_isa();
  const int64_t elements_per_task = 131072;  // about 10 us of work, so that small tiles stay on one thread
  const auto grain = [&](int64_t length) { return elements_per_task / (length > 0 ? length : 1) + 1; };
  torch::stable::parallel_for(0, panel.rows, grain(panel.cols),
                              [&](int64_t begin, int64_t end) { sslk::koleo_rows(panel, begin, end, isa); });
  if (first_row == first_col) return;  // the columns are the rows
  torch::stable::parallel_for(0, panel.cols, grain(panel.rows),
                              [&](int64_t begin, int64_t end) { sslk::koleo_columns(panel, begin, end, isa); });
}

sslk::KoleoRows make_rows(const Tensor& x, double eps, const Tensor& norm) {
  sslk::KoleoRows rows{};
  rows.type = sslk::check_features(x, "x", 2);
  rows.x = x.const_data_ptr();
  rows.rows = x.size(0);
  rows.width = x.size(1);
  rows.stride = x.stride(0);
  rows.eps = static_cast<float>(eps);
  rows.norm = sslk::output_data(norm, "norm", rows.rows);
  return rows;
}

sslk::KoleoRows make_rows(const Tensor& x, double eps, const Tensor& norm, const Tensor& neighbor,
                          const Tensor& distance) {
  sslk::KoleoRows rows = make_rows(x, eps, norm);
  rows.neighbor = sslk::check_ids(std::optional(neighbor), "neighbor", rows.rows);
  for (int64_t i = 0; i < rows.rows; ++i) {
    STD_TORCH_CHECK(0 <= rows.neighbor[i] && rows.neighbor[i] < rows.rows, "neighbor: expected 0 to ", rows.rows - 1,
                    ", got ", rows.neighbor[i]);
  }
  rows.distance = sslk::output_data(distance, "distance", rows.rows);
  return rows;
}

void koleo_unit_rows_cpu(Tensor x, double eps, Tensor norm, Tensor unit) {
  const sslk::KoleoRows rows = make_rows(x, eps, norm);
  float* data = static_cast<float*>(sslk::matrix_data(unit, "unit", sslk::FeatureType::kFloat32, rows.rows, rows.width));
  sslk::over_rows(rows.rows, rows.width, [&](int64_t begin, int64_t end, sslk::Isa isa) {
    sslk::koleo_unit_rows(rows, data, begin, end, isa);
  });
}

void koleo_loss_cpu(Tensor x, double eps, Tensor norm, Tensor neighbor, bool mean, Tensor distance, Tensor loss) {
  const sslk::KoleoRows rows = make_rows(x, eps, norm, neighbor, distance);
  sslk::over_rows(rows.rows, rows.width, [&](int64_t begin, int64_t end, sslk::Isa isa) {
    sslk::koleo_distances(rows, begin, end, isa);
  });
  std::vector<double> losses(rows.rows);
  for (int64_t i = 0; i < rows.rows; ++i) losses[i] = -std::log(double(rows.distance[i]) + rows.eps);
  sslk::reduce_rows(losses, mean, loss);
}

void koleo_gradient_cpu(Tensor upstream, Tensor x, double eps, Tensor norm, Tensor neighbor, Tensor distance, bool mean,
                        Tensor gradient) {
  const sslk::KoleoRows rows = make_rows(x, eps, norm, neighbor, distance);
  const sslk::KoleoGradient job(rows, sslk::upstream_data(upstream, rows.rows), sslk::upstream_stride(upstream),
                                mean ? 1.0 / double(rows.rows) : 1.0,
                                sslk::matrix_data(gradient, "gradient", rows.type, rows.rows, rows.width));
  sslk::over_rows(rows.rows, rows.width,
                  [&](int64_t begin, int64_t end, sslk::Isa isa) { job.write_rows(begin, end, isa); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m) {
  m.def(
      "koleo_panel_(Tensor(a!) tile, Tensor(b!) best, Tensor(c!) neighbor, int first_row, int first_col) -> ()");
  m.def("koleo_unit_rows_(Tensor x, float eps, Tensor(a!) norm, Tensor(b!) unit) -> ()");
  m.def(
      "koleo_loss_(Tensor x, float eps, Tensor norm, Tensor neighbor, bool mean, Tensor(a!) distance, Tensor(b!) loss) "
      "-> ()");
  m.def(
      "koleo_gradient_(Tensor upstream, Tensor x, float eps, Tensor norm, Tensor neighbor, Tensor distance, bool mean, "
      "Tensor(a!) gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) {
  m.impl("koleo_panel_", TORCH_BOX(&koleo_panel_cpu));
  m.impl("koleo_unit_rows_", TORCH_BOX(&koleo_unit_rows_cpu));
  m.impl("koleo_loss_", TORCH_BOX(&koleo_loss_cpu));
  m.impl("koleo_gradient_", TORCH_BOX(&koleo_gradient_cpu));
}
