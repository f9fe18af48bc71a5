// The tile kernel of the sigmoid contrastive loss. Free of torch and of Python.
#pragma once

#include <cstdint>

#include "isa.h"

namespace sslk {

struct SigmoidPanel {
  float* tile;         // [rows, cols]: x_i . y_j on entry; G_ij on return when write_grad, else unchanged
  int64_t rows;
  int64_t cols;
  int64_t row_stride;  // of tile, in elements
  double* stats;       // [rows, stats_width], contiguous; per-row sums over the tile are added to it
  int64_t stats_width; // 1: loss; 3: loss, sum G * raw (for the scale), sum G (for the bias)
  float scale;
  float bias;
  const int64_t* row_ids;  // [rows] and [cols], or both null
  const int64_t* col_ids;
  bool ignore_same_id;     // same id off the diagonal: left out of the sum instead of positive
  int64_t diagonal;        // (i, i + diagonal) is always positive
  bool write_grad;
};

// Rows [row_begin, row_end) of the panel. Distinct row ranges may run concurrently, and every result is independent
// of how the rows are split.
void sigmoid_panel(const SigmoidPanel& panel, int64_t row_begin, int64_t row_end, Isa isa);

}  // namespace sslk
