// Argument checks shared by every op's shell. A message names the argument, what came and what is expected.
//
// Tensor is that of torch's stable interface or, in the NumPy module, an array that looks like one.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <stdexcept>

#include "cpu/half.h"

namespace sslk {

template <typename Tensor>
void check_tensor(const Tensor& t, const char* name, torch::headeronly::ScalarType dtype, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected dtype ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == dim, name, ": expected ", dim, " dimensions, got ", t.dim());
}

template <typename Tensor>
void check_size(const Tensor& t, const char* name, int64_t axis, int64_t size) {
  STD_TORCH_CHECK(t.size(axis) == size, name, ": expected size ", size, " in dimension ", axis, ", got ",
                  t.size(axis));
}

template <typename Tensor>
void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_range(int64_t begin, int64_t end, int64_t size) {
  STD_TORCH_CHECK(0 <= begin && begin <= end && end <= size, "begin, end: expected a range within 0 to ", size, ", got ",
                  begin, " to ", end);
}

// A matrix of floats whose rows are contiguous and do not overlap.
template <typename Tensor>
void check_tile(const Tensor& t, const char* name) {
  check_tensor(t, name, torch::headeronly::ScalarType::Float, 2);
  if (t.numel() == 0) return;
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, ": expected unit stride along columns, got ", t.stride(1));
  STD_TORCH_CHECK(t.size(0) <= 1 || t.stride(0) >= t.size(1), name, ": expected rows that do not overlap, got stride ",
                  t.stride(0), " for ", t.size(1), " columns");
}

template <typename Tensor>
FeatureType feature_type(const Tensor& t, const char* name) {
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

inline int64_t item_size(FeatureType type) { return type == FeatureType::kFloat32 ? 4 : 2; }

// A tensor of floats, bfloat16 or half whose last dimension is contiguous.
template <typename Tensor>
FeatureType check_features(const Tensor& t, const char* name, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.dim() == dim, name, ": expected ", dim, " dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.numel() == 0 || t.size(dim - 1) == 1 || t.stride(dim - 1) == 1, name,
                  ": expected unit stride along columns, got ", t.stride(dim - 1));
  return feature_type(t, name);
}

// A contiguous vector of floats of that size.
template <typename Tensor>
void check_vector(const Tensor& t, const char* name, int64_t size) {
  check_tensor(t, name, torch::headeronly::ScalarType::Float, 1);
  check_size(t, name, 0, size);
  check_contiguous(t, name);
}

// Its data, or null when it is absent.
template <typename Tensor>
const float* vector_data(const std::optional<Tensor>& t, const char* name, int64_t size) {
  if (!t) return nullptr;
  check_vector(*t, name, size);
  return static_cast<const float*>(t->const_data_ptr());
}

// Its data, to be written.
template <typename Tensor>
float* output_data(const Tensor& t, const char* name, int64_t size) {
  check_vector(t, name, size);
  return static_cast<float*>(t.mutable_data_ptr());
}

// The data of a contiguous matrix of that type and size, to be written.
template <typename Tensor>
void* matrix_data(const Tensor& t, const char* name, FeatureType type, int64_t rows, int64_t width) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = type == FeatureType::kFloat32    ? ScalarType::Float
                           : type == FeatureType::kBFloat16 ? ScalarType::BFloat16
                                                            : ScalarType::Half;
  check_tensor(t, name, dtype, 2);
  check_size(t, name, 0, rows);
  check_size(t, name, 1, width);
  check_contiguous(t, name);
  return t.mutable_data_ptr();
}

// The data of a contiguous matrix of doubles, to be written.
template <typename Tensor>
double* stats_data(const Tensor& stats, const char* name, int64_t rows, int64_t width) {
  check_tensor(stats, name, torch::headeronly::ScalarType::Double, 2);
  check_size(stats, name, 0, rows);
  check_size(stats, name, 1, width);
  check_contiguous(stats, name);
  return static_cast<double*>(stats.mutable_data_ptr());
}

// Null when absent; otherwise the data of a contiguous int64 vector of `size` ids.
template <typename Tensor>
const int64_t* check_ids(const std::optional<Tensor>& ids, const char* name, int64_t size) {
  if (!ids) return nullptr;
  check_tensor(*ids, name, torch::headeronly::ScalarType::Long, 1);
  check_size(*ids, name, 0, size);
  check_contiguous(*ids, name);
  return static_cast<const int64_t*>(ids->const_data_ptr());
}

}  // namespace sslk
