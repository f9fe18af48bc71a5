// What follows the tiles of a contrastive loss: sums over its rows, and its gradients. Free of torch and of Python.
#pragma once

#include <cstdint>

#include "half.h"
#include "isa.h"

namespace sslk {

// One gradient: what the tiles left of it, times a factor that is known in the end.
struct Gradient {
  const float* sums;  // [rows, width], by strides in elements of which one is 1
  int64_t rows;
  int64_t width;
  int64_t row_stride;
  int64_t col_stride;
  float factor;
  FeatureType type;
  void* out;  // [rows, width], contiguous, of that type
};

// Rows [begin, end); distinct ranges may run concurrently.
void finish_gradient(const Gradient& gradient, int64_t begin, int64_t end, Isa isa);

}  // namespace sslk
