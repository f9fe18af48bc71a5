// What VICReg and Barlow Twins do beside their matrix products. Free of torch and of Python.
#pragma once

#include <cstdint>

#include "half.h"
#include "isa.h"

namespace sslk {

// Two views, and what is made of them.
struct Views {
  FeatureType type;
  const void* z[2];   // [rows, width], unit stride along columns
  int64_t stride[2];  // in elements
  int64_t rows;
  int64_t width;
  bool standardise;  // to variance 1
  double eps;        // added to the variance then
  float* out[2];     // [rows, width], contiguous: columns without their means
  float* columns;    // [3, width]: sums of squares of both views' columns, and of their difference's; or, standardised,
                     // by what either's were divided, and their products
};

// Columns [begin, end); distinct ranges may run concurrently, and every result is independent of how they are split.
void center_views(const Views& views, int64_t begin, int64_t end, Isa isa);

// Two matrices [rows, cols] with unit stride along columns; they may be one.
struct RowProducts {
  const float* a;
  const float* b;
  int64_t a_stride;
  int64_t b_stride;
  int64_t cols;
  double* out;  // [rows]
};

// Products of rows [begin, end) of a and b.
void row_products(const RowProducts& job, int64_t begin, int64_t end, Isa isa);

// The gradient by one of the views. It holds the part of the squares off the diagonal, but for a factor.
struct ViewGradient {
  float* gradient;       // [rows, width], contiguous
  float factor;
  const float* weights;  // [width], of the columns that are added
  float invariance;      // VICReg: weight of z[0] - z[1]
};

// Rows [begin, end): factor G + weights c + invariance (z[0] - z[1]), with c of the view itself.
void vicreg_gradient(const Views& views, int view, const ViewGradient& job, int64_t begin, int64_t end, Isa isa);

// Columns [begin, end): g = factor G + weights x, with x of the other view; and (g - (g . y / rows) y) / sigma, with y
// of the view itself.
void barlow_twins_gradient(const Views& views, int view, const ViewGradient& job, int64_t begin, int64_t end, Isa isa);

}  // namespace sslk
