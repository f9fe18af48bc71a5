// CPU tensors in, the torch-free tile kernel underneath, torch's own thread pool across rows.
#include "../cpu/sigmoid.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void sigmoid_panel_cpu(Tensor tile, Tensor stats, double scale, double bias, std::optional<Tensor> row_ids,
                       std::optional<Tensor> col_ids, bool ignore_same_id, int64_t diagonal, bool write_grad) {
  sslk::check_tile(tile, "tile");
  sslk::check_tensor(stats, "stats", ScalarType::Double, 2);
  sslk::check_size(stats, "stats", 0, tile.size(0));
  STD_TORCH_CHECK(stats.is_contiguous(), "stats: expected a contiguous tensor");
  STD_TORCH_CHECK(stats.size(1) == 3 || (stats.size(1) == 1 && !write_grad),
                  "stats: expected 3 columns (1 when only the loss is wanted), got ", stats.size(1));
  STD_TORCH_CHECK(row_ids.has_value() == col_ids.has_value(), "row_ids, col_ids: expected both or neither");

  sslk::SigmoidPanel panel{};
  panel.tile = tile.mutable_data_ptr<float>();
  panel.rows = tile.size(0);
  panel.cols = tile.size(1);
  panel.row_stride = tile.stride(0);
  panel.stats = stats.mutable_data_ptr<double>();
  panel.stats_width = stats.size(1);
  panel.scale = static_cast<float>(scale);
  panel.bias = static_cast<float>(bias);
  panel.row_ids = sslk::check_ids(row_ids, "row_ids", panel.rows);
  panel.col_ids = sslk::check_ids(col_ids, "col_ids", panel.cols);
  panel.ignore_same_id = ignore_same_id;
  panel.diagonal = diagonal;
  panel.write_grad = write_grad;

  const sslk::Isa isa = sslk::active_isa();
  const int64_t elements_per_task = 16384;  // about 10 us of work, so that small tiles stay on one thread
  const int64_t grain = elements_per_task / (panel.cols > 0 ? panel.cols : 1) + 1;
  torch::stable::parallel_for(0, panel.rows, grain,
                              [&](int64_t begin, int64_t end) { sslk::sigmoid_panel(panel, begin, end, isa); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m) {
  m.def(
      "sigmoid_panel_(Tensor(a!) tile, Tensor(b!) stats, float scale, float bias, Tensor? row_ids, Tensor? col_ids, "
      "bool ignore_same_id, int diagonal, bool write_grad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) { m.impl("sigmoid_panel_", TORCH_BOX(&sigmoid_panel_cpu)); }
