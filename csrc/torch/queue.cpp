// CPU tensors in, the torch-free kernel underneath, torch's own thread pool across keys.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../jobs/queue.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void enqueue_rows_cpu(Tensor queue, Tensor pointer, Tensor keys, bool normalize) {
  STD_TORCH_CHECK(pointer.is_cpu() && pointer.scalar_type() == ScalarType::Long && pointer.numel() == 1,
                  "pointer: expected one int64 element on the CPU");
  int64_t& row = *pointer.mutable_data_ptr<int64_t>();
  const auto job = sslk::enqueue_job(queue, row, keys, normalize);
  const int64_t size = job.size, batch = keys.size(0);
  const sslk::Isa isa = sslk::active_isa();
  const int64_t elements_per_task = 65536;  // about 10 us of work, so that small batches stay on one thread
  const int64_t grain = elements_per_task / (job.width > 0 ? job.width : 1) + 1;
  torch::stable::parallel_for(batch > size ? batch - size : 0, batch, grain,
                              [&](int64_t begin, int64_t end) { sslk::enqueue_rows(job, begin, end, isa); });
  row = (job.start + batch) % size;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m) {
  m.def("enqueue_rows_(Tensor(a!) queue, Tensor(b!) pointer, Tensor keys, bool normalize) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) { m.impl("enqueue_rows_", TORCH_BOX(&enqueue_rows_cpu)); }
