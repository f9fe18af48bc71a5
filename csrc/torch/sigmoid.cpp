// CPU tensors in, the torch-free tile kernel underneath, torch's own thread pool across rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../jobs/sigmoid.h"

using torch::stable::Tensor;

namespace {

void sigmoid_panel_cpu(Tensor tile, Tensor stats, double scale, double bias, std::optional<Tensor> row_ids,
                       std::optional<Tensor> col_ids, bool ignore_same_id, int64_t diagonal, bool write_grad) {
  const auto panel =
      sslk::sigmoid_job(tile, stats, scale, bias, row_ids, col_ids, ignore_same_id, diagonal, write_grad);
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
