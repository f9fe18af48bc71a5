// The tile kernels of the softmax contrastive losses (CLIP, NT-Xent, SupCon). Free of torch and of Python.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace sslk {

// A diagonal that meets no tile.
constexpr int64_t kNoDiagonal = int64_t(1) << 62;

// Raw similarities x_i . y_j, and what each pair is.
struct SoftmaxTile {
  float* raw;  // [rows, cols]
  int64_t rows;
  int64_t cols;
  int64_t row_stride;  // of raw, in elements
  float scale;         // t >= 0
  const int64_t* row_ids;  // [rows] and [cols], or both null
  const int64_t* col_ids;
  bool ignore_same_id;  // pairs of equal ids off the positive diagonal: left out instead of positive
  int64_t positive;     // (i, i + positive) is a positive pair
  int64_t excluded;     // (i, i + excluded) is left out, whatever else it is
};

// Statistics of a row or a column, accumulated over tiles, in this order. The last two only if `uniform`.
//   max of raw over the pairs that count, sum of exp(scale * (raw - max)), sum of raw over positives, their number,
//   sum of raw over the pairs that count, their number
constexpr int64_t kStats = 4, kUniformStats = 6;

// Statistics of one tile in two steps, of which each may be split over threads in any way with the same result: first
// the rows, in chunks, then the columns, out of what the chunks left.
class SoftmaxStats {
 public:
  static constexpr int64_t kChunk = 64;  // rows that share a reference for their columns' sums

  // row_stats [rows, kStats or kUniformStats]; col_stats [cols, same], or null where not wanted.
  SoftmaxStats(const SoftmaxTile& tile, double* row_stats, double* col_stats, bool uniform);

  int64_t chunks() const { return (tile.rows + kChunk - 1) / kChunk; }
  void add_rows(int64_t chunk_begin, int64_t chunk_end, Isa isa);
  void add_columns(int64_t col_begin, int64_t col_end, Isa isa);

  const SoftmaxTile tile;
  double* const row_stats;
  double* const col_stats;
  const bool uniform;
  const int64_t width;       // of the statistics
  std::vector<float> sums;   // [chunks, planes, cols]: per chunk and column, the statistics but for the maximum
  std::vector<float> tops;   // [chunks]: the largest raw similarity of a chunk, to which its sums of exp refer
  const int64_t planes;
};

// The gradient of the loss by z = scale * raw, in place of the similarities. With P = exp(scale * (raw - top) - log_sum):
//   G_ij = row_weight_i P_ij(rows) + col_weight_j P_ij(columns)
//          - [positive] (row_target_i + col_target_j) - (row_uniform_i + col_uniform_j),   0 where left out
struct SoftmaxGrad {
  struct Side {
    const float* top;
    const float* log_sum;
    const float* weight;
    const float* target;
    const float* uniform;  // null without label smoothing, then on both sides
  };
  SoftmaxTile tile;
  double* stats;  // [rows]: sum_j G_ij raw_ij is added
  Side row, col;
  bool write;  // whether G replaces the similarities
};

// What the statistics of rows and columns come to, between the two passes over the tiles.
//   loss of a row or column = scale (max - mean of raw over positives) + log(sum of exp), 0 without a positive; with
//   label smoothing s, 1 - s of the first term and s of that with the mean over all pairs that count
// Its weight in the whole is 1 / n_sides, over the number of those with a positive if `mean`; or row_weight / n_sides.
struct SoftmaxSummary {
  int64_t n_sides;  // 2, or 1 where columns are rows
  const double* stats[2];
  int64_t size[2];
  int64_t width;  // kStats, or kUniformStats with label smoothing
  double scale;
  double label_smoothing;
  bool mean;
  const float* row_weight;  // [size], the same for all sides, or null
  float* losses;            // [size], the sum over sides of each row, or null
  float* loss;              // of all, or null
  int64_t* unpaired;        // how many have no positive
  float* unit;              // the largest weight, by which all in `side` are divided; 1 if that is 0
  float* side[2];           // the vectors of SoftmaxGrad::Side, one after the other; or null
};

void softmax_summary(const SoftmaxSummary& summary);

// Rows [row_begin, row_end); distinct ranges may run concurrently, and the result does not depend on the split.
void softmax_grad(const SoftmaxGrad& grad, int64_t row_begin, int64_t row_end, Isa isa);

// Of a square tile, what is above the diagonal over rows [begin, end) of what is below. A product of a matrix with its
// own transpose is not symmetric to the last bit, which decides where logits are large. Distinct ranges may run
// concurrently.
void mirror_rows(float* tile, int64_t stride, int64_t begin, int64_t end);

}  // namespace sslk
