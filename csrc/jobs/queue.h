// Arguments of the ring buffer of keys, checked and as its kernel takes them.
#pragma once

#include "../checks.h"
#include "../cpu/queue.h"

namespace sslk {

// Key 0 goes to the row `pointer`, modulo the size.
template <typename Tensor>
Enqueue enqueue_job(const Tensor& queue, int64_t pointer, const Tensor& keys, bool normalize) {
  Enqueue job{};
  job.queue_type = check_features(queue, "queue", 2);
  job.keys_type = check_features(keys, "keys", 2);
  job.size = queue.size(0);
  job.width = queue.size(1);
  check_size(keys, "keys", 1, job.width);
  STD_TORCH_CHECK(job.size > 0, "queue: expected at least 1 row, got 0");
  STD_TORCH_CHECK(job.size == 1 || queue.stride(0) >= job.width,
                  "queue: expected rows that do not overlap, got stride ", queue.stride(0), " for ", job.width,
                  " columns");
  job.queue = queue.mutable_data_ptr();
  job.queue_stride = queue.stride(0);
  job.keys = keys.const_data_ptr();
  job.keys_stride = keys.stride(0);
  job.start = (pointer % job.size + job.size) % job.size;
  job.normalize = normalize;
  return job;
}

}  // namespace sslk
