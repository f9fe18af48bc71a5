// The tile kernel of the softmax over frozen keys. Free of torch and of Python.
#pragma once

#include <cstdint>

#include "isa.h"

namespace sslk {

struct KeySoftmaxPanel {
  float* tile;         // [rows, cols]: r = q_i . k_j on entry; with a mean, exp(|scale| (sign r - maximum)) on return
  int64_t rows;
  int64_t cols;
  int64_t row_stride;  // of tile, in elements
  double* stats;       // [rows, 2], contiguous: maximum of sign r, sign that of the scale, and the sum of
                       // exp(|scale| (sign r - maximum)); -infinity and 0 before the first tile
  float* mean;         // [rows, width]: keys weighed by the exponentials so far, brought to the new maximum; or null
  int64_t width;
  int64_t mean_stride;
  float scale;
};

// Rows [row_begin, row_end) of the panel. Distinct row ranges may run concurrently, and every result is independent
// of how the rows are split.
void key_softmax_panel(const KeySoftmaxPanel& panel, int64_t row_begin, int64_t row_end, Isa isa);

}  // namespace sslk
