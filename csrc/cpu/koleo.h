// The tile kernels of the search for nearest neighbours. Free of torch and of Python.
#pragma once

#include <cstdint>

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
  const float* tile;   // [rows, cols]: similarities
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

}  // namespace sslk
