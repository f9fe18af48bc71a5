// Argument checks shared by every op's shell. A message names the argument, what came and what is expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "cpu/half.h"

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

inline void check_range(int64_t begin, int64_t end, int64_t size) {
  STD_TORCH_CHECK(0 <= begin && begin <= end && end <= size, "begin, end: expected a range within 0 to ", size, ", got ",
                  begin, " to ", end);
}

// A matrix of floats whose rows are contiguous and do not overlap.
inline void check_tile(const torch::stable::Tensor& t, const char* name) {
  check_tensor(t, name, torch::headeronly::ScalarType::Float, 2);
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, ": expected unit stride along columns, got ", t.stride(1));
  STD_TORCH_CHECK(t.size(0) <= 1 || t.stride(0) >= t.size(1), name, ": expected rows that do not overlap, got stride ",
                  t.stride(0), " for ", t.size(1), " columns");
}

inline FeatureType feature_type(const torch::stable::Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return FeatureType::kFloat32;
    case torch::headeronly::ScalarType::BFloat16:
      return FeatureType::kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return FeatureType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected dtype Float, BFloat16 or Half, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

// A tensor of floats, bfloat16 or half whose last dimension is contiguous.
inline FeatureType check_features(const torch::stable::Tensor& t, const char* name, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.dim() == dim, name, ": expected ", dim, " dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.numel() == 0 || t.size(dim - 1) == 1 || t.stride(dim - 1) == 1, name,
                  ": expected unit stride along columns, got ", t.stride(dim - 1));
  return feature_type(t, name);
}

// A contiguous vector of floats of that size.
inline void check_vector(const torch::stable::Tensor& t, const char* name, int64_t size) {
  check_tensor(t, name, torch::headeronly::ScalarType::Float, 1);
  check_size(t, name, 0, size);
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

// Its data, or null when it is absent.
inline const float* vector_data(const std::optional<torch::stable::Tensor>& t, const char* name, int64_t size) {
  if (!t) return nullptr;
  check_vector(*t, name, size);
  return t->const_data_ptr<float>();
}

// Its data, to be written.
inline float* output_data(const torch::stable::Tensor& t, const char* name, int64_t size) {
  check_vector(t, name, size);
  return t.mutable_data_ptr<float>();
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
