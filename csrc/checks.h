// Argument checks shared by every op's shell. A message names the argument, what came and what is expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace sslk {

inline void check_tensor(const torch::stable::Tensor& t, const char* name, torch::headeronly::ScalarType dtype,
                         int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected dtype ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == dim, name, ": expected ", dim, " dimensions, got ", t.dim());
}

inline void check_size(const torch::stable::Tensor& t, const char* name, int64_t axis, int64_t size) {
  STD_TORCH_CHECK(t.size(axis) == size, name, ": expected size ", size, " in dimension ", axis, ", got ",
                  t.size(axis));
}

// A matrix of floats whose rows are contiguous and do not overlap.
inline void check_tile(const torch::stable::Tensor& t, const char* name) {
  check_tensor(t, name, torch::headeronly::ScalarType::Float, 2);
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, ": expected unit stride along columns, got ", t.stride(1));
  STD_TORCH_CHECK(t.size(0) <= 1 || t.stride(0) >= t.size(1), name, ": expected rows that do not overlap, got stride ",
                  t.stride(0), " for ", t.size(1), " columns");
}

// Null when absent; otherwise the data of a contiguous int64 vector of `size` ids.
inline const int64_t* check_ids(const std::optional<torch::stable::Tensor>& ids, const char* name, int64_t size) {
  if (!ids) return nullptr;
  check_tensor(*ids, name, torch::headeronly::ScalarType::Long, 1);
  check_size(*ids, name, 0, size);
  STD_TORCH_CHECK(ids->is_contiguous(), name, ": expected a contiguous tensor");
  return ids->const_data_ptr<int64_t>();
}

}  // namespace sslk
