// Rows divided by their norms, and the gradient of that. Free of torch and of Python.
#pragma once

#include <cstdint>

#include "half.h"
#include "isa.h"

namespace sslk {

struct UnitRows {
  FeatureType type;  // of z
  const void* z;     // [rows, width], unit stride along columns
  int64_t rows;
  int64_t width;
  int64_t stride;  // of z, in elements
  float eps;       // the least norm
  float* norm;     // [rows]: written, or read for the gradient
  float* unit;     // [rows, width], contiguous: written; or, for the gradient, the gradient by them
  void* gradient;  // [rows, width], contiguous, of the type of z
};

// Rows [begin, end); distinct ranges may run concurrently.
void unit_rows(const UnitRows& job, int64_t begin, int64_t end, Isa isa);
void unit_rows_gradient(const UnitRows& job, int64_t begin, int64_t end, Isa isa);

}  // namespace sslk
