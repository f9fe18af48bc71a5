// Losses that are a number to a row: what comes in and goes out beside the features.
#pragma once

#include <vector>

#include "../checks.h"
#include "parallel.h"

namespace sslk {

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

}  // namespace sslk
