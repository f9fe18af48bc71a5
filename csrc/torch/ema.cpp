// Lists of CPU tensors in, the torch-free kernel underneath, torch's own thread pool across all of their elements.
#include "../cpu/ema.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../ema_lists.h"

using torch::stable::Tensor;

namespace {

void ema_update_cpu(std::vector<Tensor> targets, std::vector<Tensor> sources, std::vector<Tensor> copies,
                    double momentum) {
  STD_TORCH_CHECK(momentum >= 0 && momentum <= 1, "momentum: expected a number in [0, 1], got ", momentum);
  const auto is_here = [](const Tensor& t) { return t.is_cpu(); };
  const sslk::Ema ema(sslk::ema_tensors(targets, sources, copies, is_here, "a CPU tensor"), momentum);
  const sslk::Isa isa = sslk::active_isa();
  const int64_t elements_per_task = 65536;  // about 20 us of work, so that small models stay on one thread
  torch::stable::parallel_for(0, ema.blocks(), elements_per_task / sslk::Ema::kBlock,
                              [&](int64_t begin, int64_t end) { ema.update(begin, end, isa); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m) {
  m.def("ema_update_(Tensor(a!)[] targets, Tensor[] sources, Tensor(b!)[] copies, float momentum) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) { m.impl("ema_update_", TORCH_BOX(&ema_update_cpu)); }
