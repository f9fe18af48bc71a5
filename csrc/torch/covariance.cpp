// CPU tensors in, the torch-free kernels underneath, torch's own thread pool across rows and across columns.
#include "../cpu/covariance.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../checks.h"
#include "parallel.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

template <typename Columns>
void over_columns(const sslk::Views& views, Columns columns) {
  const int64_t few = 64;  // of which most are in whole vectors
  torch::stable::parallel_for(0, views.width, std::max(few, sslk::grain(views.rows)), columns);
}

float* matrix_data(const Tensor& t, const char* name, int64_t rows, int64_t cols) {
  return static_cast<float*>(sslk::matrix_data(t, name, sslk::FeatureType::kFloat32, rows, cols));
}

sslk::Views views_of(const Tensor& za, const Tensor& zb, const Tensor& a, const Tensor& b, const Tensor& columns) {
  sslk::Views views{};
  views.type = sslk::check_features(za, "za", 2);
  STD_TORCH_CHECK(sslk::check_features(zb, "zb", 2) == views.type, "zb: expected the dtype of za");
  views.rows = za.size(0);
  views.width = za.size(1);
  sslk::check_size(zb, "zb", 0, views.rows);
  sslk::check_size(zb, "zb", 1, views.width);
  views.z[0] = za.const_data_ptr();
  views.z[1] = zb.const_data_ptr();
  views.stride[0] = za.stride(0);
  views.stride[1] = zb.stride(0);
  views.out[0] = matrix_data(a, "a", views.rows, views.width);
  views.out[1] = matrix_data(b, "b", views.rows, views.width);
  views.columns = matrix_data(columns, "columns", 3, views.width);
  return views;
}

// Without eps, columns are left as long as they are.
void center_views_cpu(Tensor za, Tensor zb, std::optional<double> eps, Tensor a, Tensor b, Tensor columns) {
  sslk::Views views = views_of(za, zb, a, b, columns);
  views.standardise = eps.has_value();
  views.eps = eps.value_or(0);
  const sslk::Isa isa = sslk::active_isa();
  over_columns(views, [&](int64_t begin, int64_t end) { sslk::center_views(views, begin, end, isa); });
}

double inner_product_cpu(Tensor a, Tensor b) {
  sslk::check_tile(a, "a");
  sslk::check_tile(b, "b");
  const int64_t rows = a.size(0), cols = a.size(1);
  sslk::check_size(b, "b", 0, rows);
  sslk::check_size(b, "b", 1, cols);
  std::vector<double> sums(rows);
  const sslk::RowProducts job{a.const_data_ptr<float>(), b.const_data_ptr<float>(), a.stride(0), b.stride(0), cols,
                              sums.data()};
  sslk::over_rows(rows, cols, [&](int64_t begin, int64_t end, sslk::Isa isa) {
    sslk::row_products(job, begin, end, isa);
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

void vicreg_finish_cpu(Tensor za, Tensor zb, Tensor a, Tensor b, Tensor columns, double squares_a, double squares_b,
                       double invariance_weight, double variance_weight, double covariance_weight, double eps,
                       Tensor loss, std::optional<Tensor> da, std::optional<Tensor> db) {
  const sslk::Views views = views_of(za, zb, a, b, columns);
  const int64_t width = views.width;
  const double rows = double(views.rows), free = rows - 1, size = rows * double(width);
  const double covariance = covariance_weight / (double(width) * free * free);
  const double variance = 0.5 * variance_weight / double(width);
  const float* differences = views.columns + 2 * width;
  double total = covariance * (squares_a + squares_b);
  total += invariance_weight / size * std::accumulate(differences, differences + width, 0.0);
  std::vector<float> weights(width);
  const std::optional<Tensor>* gradients[] = {&da, &db};
  for (int view = 0; view < 2; ++view) {
    double below = 0;
    for (int64_t col = 0; col < width; ++col) {
      const double sigma = std::sqrt(views.columns[view * width + col] / free + eps);
      below += sigma >= 1 ? 0 : 1 - sigma;  // of NaN, NaN
      weights[col] = sigma < 1 ? static_cast<float>(-variance / (free * sigma)) : 0;
    }
    total += variance * below;
    if (!*gradients[view]) continue;
    sslk::ViewGradient job{};
    job.gradient = matrix_data(**gradients[view], "da, db", views.rows, width);
    job.factor = static_cast<float>(4 * covariance);
    job.weights = weights.data();
    job.invariance = static_cast<float>((view == 0 ? 2 : -2) * invariance_weight / size);
    sslk::over_rows(views.rows, width, [&](int64_t begin, int64_t end, sslk::Isa isa) {
      sslk::vicreg_gradient(views, view, job, begin, end, isa);
    });
  }
  sslk::check_tensor(loss, "loss", ScalarType::Float, 0);
  *loss.mutable_data_ptr<float>() = static_cast<float>(total);
}

void barlow_twins_finish_cpu(Tensor a, Tensor b, Tensor columns, double squares, double lambda_param, Tensor loss,
                             std::optional<Tensor> da, std::optional<Tensor> db) {
  const sslk::Views views = views_of(a, b, a, b, columns);  // as they came they are not needed again
  const double rows = double(views.rows), others = lambda_param / (rows * rows);
  const float* products = views.columns + 2 * views.width;
  double total = others * squares;
  std::vector<float> weights(views.width);
  for (int64_t col = 0; col < views.width; ++col) {
    const double missing = products[col] / rows - 1;
    total += missing * missing;
    weights[col] = static_cast<float>(2 / rows * missing);
  }
  const std::optional<Tensor>* gradients[] = {&da, &db};
  for (int view = 0; view < 2; ++view) {
    if (!*gradients[view]) continue;
    sslk::ViewGradient job{};
    job.gradient = matrix_data(**gradients[view], "da, db", views.rows, views.width);
    job.factor = static_cast<float>(2 * others);
    job.weights = weights.data();
    const sslk::Isa isa = sslk::active_isa();
    over_columns(views, [&](int64_t begin, int64_t end) {
      sslk::barlow_twins_gradient(views, view, job, begin, end, isa);
    });
  }
  sslk::check_tensor(loss, "loss", ScalarType::Float, 0);
  *loss.mutable_data_ptr<float>() = static_cast<float>(total);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m) {
  m.def("center_views_(Tensor za, Tensor zb, float? eps, Tensor(a!) a, Tensor(b!) b, Tensor(c!) columns) -> ()");
  m.def("inner_product(Tensor a, Tensor b) -> float");
  m.def(
      "vicreg_finish_(Tensor za, Tensor zb, Tensor a, Tensor b, Tensor columns, float squares_a, float squares_b, "
      "float invariance_weight, float variance_weight, float covariance_weight, float eps, "
      "Tensor(a!) loss, Tensor(b!)? da, Tensor(c!)? db) -> ()");
  m.def(
      "barlow_twins_finish_(Tensor a, Tensor b, Tensor columns, float squares, float lambda_param, "
      "Tensor(a!) loss, Tensor(b!)? da, Tensor(c!)? db) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) {
  m.impl("center_views_", TORCH_BOX(&center_views_cpu));
  m.impl("inner_product", TORCH_BOX(&inner_product_cpu));
  m.impl("vicreg_finish_", TORCH_BOX(&vicreg_finish_cpu));
  m.impl("barlow_twins_finish_", TORCH_BOX(&barlow_twins_finish_cpu));
}
