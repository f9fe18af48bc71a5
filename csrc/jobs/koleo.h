// Arguments of the search for nearest neighbours, checked and as its kernels take them.
#pragma once

#include "../checks.h"
#include "../cpu/koleo.h"

namespace sslk {

template <typename Tensor>
KoleoPanel koleo_job(const Tensor& tile, const Tensor& best, const Tensor& neighbor, int64_t first_row,
                     int64_t first_col) {
  check_tile(tile, "tile");
  check_tensor(best, "best", torch::headeronly::ScalarType::Float, 1);
  check_tensor(neighbor, "neighbor", torch::headeronly::ScalarType::Long, 1);
  const int64_t rows = tile.size(0), cols = tile.size(1), size = best.size(0);
  check_size(neighbor, "neighbor", 0, size);
  check_contiguous(best, "best");
  check_contiguous(neighbor, "neighbor");
  STD_TORCH_CHECK(rows <= INT32_MAX && cols <= INT32_MAX, "tile: expected at most 2**31 - 1 rows and columns, got ",
                  rows, " and ", cols);
  STD_TORCH_CHECK(0 <= first_row && first_row <= size - rows, "first_row: expected 0 to ", size - rows, ", got ",
                  first_row);
  STD_TORCH_CHECK(0 <= first_col && first_col <= size - cols, "first_col: expected 0 to ", size - cols, ", got ",
                  first_col);
  STD_TORCH_CHECK(first_row != first_col || rows == cols, "tile: expected a square one on the diagonal, got ", rows,
                  " rows and ", cols, " columns");
  const auto side = [&](int64_t first) {
    return KoleoSide{static_cast<float*>(best.mutable_data_ptr()) + first,
                     static_cast<int64_t*>(neighbor.mutable_data_ptr()) + first, first};
  };
  return {static_cast<float*>(tile.mutable_data_ptr()), rows, cols, tile.stride(0), side(first_row), side(first_col)};
}

}  // namespace sslk
