// Losses that are a number to a row: what comes in and goes out beside the features, and the split over threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../checks.h"
#include "../cpu/isa.h"

namespace sslk {

// Calls body(begin, end, isa) for ranges of the rows, from torch's own threads.
template <typename Body>
void over_rows(int64_t rows, int64_t width, Body body) {
  const Isa isa = active_isa();
  const int64_t elements_per_task = 16384;  // a few us of work, so that small batches stay on one thread
  torch::stable::parallel_for(0, rows, elements_per_task / (width > 0 ? width : 1) + 1,
                              [&](int64_t begin, int64_t end) { body(begin, end, isa); });
}

// All rows to a loss of one dimension; their sum, or their mean, to one of none.
inline void reduce_rows(const std::vector<double>& rows, bool mean, const torch::stable::Tensor& loss) {
  if (loss.dim() == 1) {
    float* out = output_data(loss, "loss", int64_t(rows.size()));
    for (size_t i = 0; i < rows.size(); ++i) out[i] = static_cast<float>(rows[i]);
    return;
  }
  check_tensor(loss, "loss", torch::headeronly::ScalarType::Float, 0);
  double sum = 0;
  for (double row : rows) sum += row;
  *loss.mutable_data_ptr<float>() = static_cast<float>(mean ? sum / double(rows.size()) : sum);
}

// The gradient by such a loss: one number for all rows, by a stride of 0, or one for each.
inline const float* upstream_data(const torch::stable::Tensor& upstream, int64_t rows) {
  check_tensor(upstream, "upstream", torch::headeronly::ScalarType::Float, upstream.dim() == 0 ? 0 : 1);
  if (upstream.dim() == 1) check_size(upstream, "upstream", 0, rows);
  return upstream.const_data_ptr<float>();
}

inline int64_t upstream_stride(const torch::stable::Tensor& upstream) {
  return upstream.dim() == 0 ? 0 : upstream.stride(0);
}

// The data of a contiguous matrix, to be written.
inline void* matrix_data(const torch::stable::Tensor& t, const char* name, FeatureType type, int64_t rows,
                         int64_t width) {
  STD_TORCH_CHECK(check_features(t, name, 2) == type && t.is_contiguous() && t.size(0) == rows && t.size(1) == width,
                  name, ": expected a contiguous matrix of the rows, and of their dtype");
  return t.mutable_data_ptr();
}

}  // namespace sslk
