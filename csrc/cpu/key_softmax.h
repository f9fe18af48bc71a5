// The softmax over frozen keys: its tile kernel, and what follows the tiles. Free of torch and of Python.
#pragma once

#include <cstdint>

#include "half.h"
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

// What the statistics of all tiles come to: the log-sum-exp and the mean of the keys. Beside a positive key p_i for each
// query, the loss of InfoNCE, log(1 + exp(lse_i - scale q_i . p_i)), and mean_i - p_i.
struct KeySoftmaxRows {
  int64_t rows;
  int64_t width;
  const double* stats;  // [rows, 2], contiguous
  double scale;
  float* mean;     // [rows, width], contiguous: keys weighed by exponentials on entry; or null
  double* values;  // [rows]: lse_i, or the loss
  // Of InfoNCE; the features are rows of one type with unit stride along columns.
  float* slopes;  // [rows]: the derivative of the loss by lse_i, times the unit; null for the log-sum-exp alone
  double unit;    // the weight of a row in the whole loss
  bool positive_is_key;  // then the statistics hold it already, and lse - z is the loss
  FeatureType type;
  const void* query;
  const void* positive;
  int64_t query_stride;  // in elements
  int64_t positive_stride;
};

// The gradient of what has the derivative f_i = upstream_i slope_i by lse_i; beside a positive, -f_i by scale q_i . p_i.
struct KeySoftmaxGradient {
  int64_t rows;
  int64_t width;
  FeatureType type;
  const void* query;  // rows with unit stride along columns
  int64_t query_stride;
  const float* pull;  // [rows, width], contiguous: mean_i, or mean_i - p_i; null if only that by p is wanted
  double scale;
  const float* upstream;  // [rows], by its stride
  int64_t upstream_stride;
  const float* slopes;  // [rows], or null for 1
  void* by_query;       // [rows, width], contiguous, of the type of query: f_i scale pull_i; or null, as the others
  void* by_positive;    // likewise: -f_i scale q_i
  double* by_scale;     // [rows], to be summed: f_i q_i . pull_i
};

// Rows [begin, end); distinct ranges may run concurrently.
void key_softmax_rows(const KeySoftmaxRows& job, int64_t begin, int64_t end, Isa isa);
void key_softmax_gradient(const KeySoftmaxGradient& job, int64_t begin, int64_t end, Isa isa);

}  // namespace sslk
