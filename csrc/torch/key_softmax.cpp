// CPU tensors in, the torch-free tile kernel underneath, torch's own thread pool across rows.
#include "../cpu/key_softmax.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void key_softmax_panel_cpu(Tensor tile, Tensor stats, std::optional<Tensor> mean, double scale) {
  sslk::check_tile(tile, "tile");
  sslk::check_tensor(stats, "stats", ScalarType::Double, 2);
  sslk::check_size(stats, "stats", 0, tile.size(0));
  sslk::check_size(stats, "stats", 1, 2);
  STD_TORCH_CHECK(stats.is_contiguous(), "stats: expected a contiguous tensor");

  sslk::KeySoftmaxPanel panel{};
  panel.tile = tile.mutable_data_ptr<float>();
  panel.rows = tile.size(0);
  panel.cols = tile.size(1);
  panel.row_stride = tile.stride(0);
  panel.stats = stats.mutable_data_ptr<double>();
  if (mean) {
    sslk::check_tile(*mean, "mean");
    sslk::check_size(*mean, "mean", 0, panel.rows);
    panel.mean = mean->mutable_data_ptr<float>();
    panel.width = mean->size(1);
    panel.mean_stride = mean->stride(0);
  }
  panel.scale = static_cast<float>(scale);

  const sslk::Isa isa = sslk::active_isa();
  const int64_t elements_per_task = 16384;  // about 10 us of work, so that small tiles stay on one thread
  const int64_t grain = elements_per_task / (panel.cols > 0 ? panel.cols : 1) + 1;
  torch::stable::parallel_for(0, panel.rows, grain,
                              [&](int64_t begin, int64_t end) { sslk::key_softmax_panel(panel, begin, end, isa); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m) {
  m.def("key_softmax_panel_(Tensor(a!) tile, Tensor(b!) stats, Tensor(c!)? mean, float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) { m.impl("key_softmax_panel_", TORCH_BOX(&key_softmax_panel_cpu)); }
