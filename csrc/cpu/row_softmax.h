// The tile kernels of a softmax over rows alone. Free of torch and of Python.
#pragma once

#include <cstdint>

#include "isa.h"

namespace sslk {

// What pairs of equal ids are, the target of a row aside.
enum class SameId : int64_t { kIgnored, kPositive, kNegative };

// Written in the place of a similarity, it says that the pair is left out; so does every number below the second.
constexpr float kLeftOut = -2e38f, kLeastSimilarity = -1e38f;

// Raw similarities x_i . y_j, and what becomes of each:
//   s_ij = raw_ij row_factor_i col_factor_j,   z_ij = t_ij s_ij + bias_j
// with t_ij = scale for positives, same_scale for other pairs of equal ids, and other_scale for the rest. Statistics
// are those of v: of z if `logits`, else of raw, which z is `scale` times then. So z = unit() v, and differences of
// similarities come before their product with a scale wherever there is nothing else to add.
struct RowTile {
  float* raw;  // [rows, cols]
  int64_t rows;
  int64_t cols;
  int64_t row_stride;  // of raw, in elements
  const int64_t* target;   // [rows]: the column of a row's target, counted from the first of the tile, if it is in it
  const int64_t* row_ids;  // [rows] and [cols], or both null
  const int64_t* col_ids;
  SameId same_id;
  bool guided;  // whether there may be similarities that stand for pairs that are left out
  bool logits;
  float scale;
  float same_scale;
  float other_scale;
  const float* bias;        // [cols], or null; -infinity leaves pairs out
  const float* row_factor;  // [rows] and [cols], or both null
  const float* col_factor;

  float unit() const { return logits ? 1 : scale; }
};

// Statistics of a row, accumulated over tiles, in this order. The last two only if they are asked for.
//   max of v over the pairs that count, sum of exp(unit (v - max)), sum of v over positives, their number,
//   sum of v over the pairs that count, their number
constexpr int64_t kRowStats = 4, kAllRowStats = 6;

struct RowStats {
  RowTile tile;
  double* stats;  // [rows, width]
  int64_t width;
  float* exps;  // [cols], or null: exp(unit (v - max)) of the last row, as good as 0 where left out
};

// Scores of another model: where one exceeds the threshold of its row, the pair is left out, unless it is positive.
struct RowGuide {
  RowTile tile;
  const float* scores;  // [rows, cols]
  int64_t score_stride;
  const float* threshold;  // [rows]
};

// The gradient of the loss by z. With P = exp(unit (v - top) - log_sum):
//   G_ij = weight_i P_ij - [positive] target_i - all_i,   0 where left out
struct RowGrad {
  static constexpr int64_t kChunk = 64;  // rows whose sums by column are one

  RowTile tile;
  double* moments;  // [rows]: sum_j G_ij s_ij is added
  int64_t moment_stride;
  const float* top;  // this and what follows: [rows]
  const float* log_sum;
  const float* weight;
  const float* target;
  const float* all;  // or null
  float* col_sums;     // [chunks, cols]: sum_i G_ij of the rows of each chunk, or null
  float* col_moments;  // the same of G_ij s_ij
  bool write;  // whether G, times the factors if there are some, replaces the similarities

  static int64_t chunks(int64_t rows) { return (rows + kChunk - 1) / kChunk; }
  // Rows that one thread takes at least, so that sums by column are those of a chunk.
  int64_t step() const { return col_sums || col_moments ? kChunk : 1; }
  int64_t steps() const { return (tile.rows + step() - 1) / step(); }
};

// What the statistics of rows come to, between the two passes over the tiles.
//   loss of a row = unit (max - mean of v over positives) + log(sum of exp), 0 without a positive; with label smoothing
//   e, 1 - e of the first term and e of that with the mean over all pairs that count. Or its log-sum-exp, if `lse`.
// Its weight in the whole is that of the row, over the number of rows with a positive if `mean`.
struct RowSummary {
  const double* stats;
  int64_t rows;
  int64_t width;
  double unit;
  double label_smoothing;
  bool mean;
  bool lse;
  const float* weight;  // [rows], or null for 1
  float* losses;        // [rows], or null
  float* loss;          // their sum or mean, or null
  float* largest;       // the largest weight, by which all in `side` are divided; 1 if that is 0
  float* side;          // the vectors of RowGrad from `top` on, [4, rows], or [5, rows] with label smoothing; or null
};

void row_softmax_summary(const RowSummary& summary);

// NaN if one is NaN, and 1 if all are 0, or null.
double largest_weight(const float* weight, int64_t rows);

// What the gradient needs to know of one row: as in RowGrad.
struct RowSide {
  float top, log_sum, weight, target, all;
};

// What a visit keeps of a row of one prefix between its statistics and its gradient.
struct RowKept {
  RowSide side;
  float inverse;  // of the sum of exponentials
  float least;    // exponentials below it count as 0, as in probability()
  float* exps;    // [cols]
};

// All that there is to do with tiles that have all columns of their rows: statistics and then gradients, row by row,
// while that of every prefix is in the first caches. The gradient takes the exponentials of the statistics.
struct RowVisit {
  const RowStats* stats;  // of each prefix
  const RowGrad* grads;   // which have no vectors by row
  int64_t count;
  const float* weight;   // [rows], or null for 1
  double largest;        // of the weights, by which they are divided in G
  const double* shares;  // [count]: the weight of each prefix, at most 1
  double label_smoothing;

  // What the statistics of a row of one prefix come to.
  void keep(RowKept& kept, int64_t k, int64_t row) const;
};

// Rows [begin, end). Distinct ranges may run concurrently, and the result does not depend on the split.
void row_softmax_guide(const RowGuide& guide, int64_t begin, int64_t end, Isa isa);

// Likewise, of the prefixes of the features, row by row so that all of a row stays in the first caches. The tile of the
// first prefix holds its similarities, and those of the others hold what each adds to the one before, until the
// statistics have put the sums there.
void row_softmax_stats(const RowStats* prefixes, int64_t count, int64_t begin, int64_t end, Isa isa);

// Likewise, of steps. Each tile receives the sum of G over its prefix and all longer ones. `summed` says that the tiles
// hold the sums that the statistics have put there.
void row_softmax_grad(const RowGrad* prefixes, int64_t count, bool summed, int64_t begin, int64_t end, Isa isa);

// Likewise: statistics of tiles that are not summed, and the gradients in their place.
void row_softmax_visit(const RowVisit& visit, int64_t begin, int64_t end, Isa isa);

}  // namespace sslk
