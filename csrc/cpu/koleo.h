// KoLeo: the search for nearest neighbours in tiles, and what precedes and follows it. Free of torch and of Python.
#pragma once

#include <cstdint>
#include <vector>

#include "half.h"
#include "isa.h"

namespace sslk {

// What a side of the tile, its rows or its columns, has found so far: for each the largest similarity, and with whom.
// -infinity before the first tile.
struct KoleoSide {
  float* best;
  int64_t* neighbor;
  int64_t first;  // what the first of this side is to the others, as a neighbour
};

struct KoleoPanel {
  float* tile;         // [rows, cols]: similarities; where row.first is col.first its rows are its columns, and the
                       // diagonal becomes -infinity
  int64_t rows;        // less than 2^31, and so are the columns
  int64_t cols;
  int64_t row_stride;  // of tile, in elements
  KoleoSide row;       // [rows]
  KoleoSide col;       // [cols]
};

// The neighbours of rows [begin, end) among the columns, and of columns [begin, end) among the rows. What was found
// before stays unless a similarity is larger; of equals the first is taken. NaN is never taken. Distinct ranges may run
// concurrently, and every result is independent of how they are split.
void koleo_rows(const KoleoPanel& panel, int64_t begin, int64_t end, Isa isa);
void koleo_columns(const KoleoPanel& panel, int64_t begin, int64_t end, Isa isa);

// Rows x_i and what is known of them, with u_i = x_i / max(|x_i|, eps).
struct KoleoRows {
  FeatureType type;
  const void* x;  // [rows, width], unit stride along columns
  int64_t rows;
  int64_t width;
  int64_t stride;  // of x, in elements
  float eps;
  float* norm;              // [rows]: |x_i|
  const int64_t* neighbor;  // [rows]: n(i)
  float* distance;          // [rows]: |u_i - u_n(i) + eps|
};

// Writes the norms, and the unit rows [rows, width] as they are searched: in fp32, with 0 for NaN.
void koleo_unit_rows(const KoleoRows& rows, float* unit, int64_t begin, int64_t end, Isa isa);

// Writes the distances.
void koleo_distances(const KoleoRows& rows, int64_t begin, int64_t end, Isa isa);

// The gradient by x of sum_i weight_i L_i, L_i = -log(distance_i + eps). What row i pushes away its neighbour is known
// to the neighbour by a list, in rising order: every row is summed in one order, however rows are split.
class KoleoGradient {
 public:
  // weight_i = upstream[i * upstream_stride] * unit; gradient [rows, width], contiguous, of the type of x.
  KoleoGradient(const KoleoRows& rows, const float* upstream, int64_t upstream_stride, double unit, void* gradient);

  void write_rows(int64_t begin, int64_t end, Isa isa) const;

  const KoleoRows rows;
  void* const gradient;
  std::vector<float> push;     // [rows]: weight_i / (distance_i (distance_i + eps)), 0 where the distance is
  std::vector<int64_t> first;  // [rows + 1]: where the list of a row starts in
  std::vector<int64_t> those;  // [rows]: i of which the row is the neighbour
};

}  // namespace sslk
