#include "softmax.h"

#include <algorithm>

#define SSLK_KERNEL "softmax-inl.h"
#include "foreach_isa.h"

namespace sslk {

SoftmaxStats::SoftmaxStats(const SoftmaxTile& tile, double* row_stats, double* col_stats, bool uniform)
    : tile(tile),
      row_stats(row_stats),
      col_stats(col_stats),
      uniform(uniform),
      width(uniform ? kUniformStats : kStats),
      planes(tile.row_ids || uniform ? width - 1 : 1) {
  if (col_stats) {
    sums.resize(chunks() * planes * tile.cols);
    tops.resize(chunks());
  }
}

void SoftmaxStats::add_rows(int64_t chunk_begin, int64_t chunk_end, Isa isa) {
  SSLK_DISPATCH(isa, softmax_stats_rows, *this, chunk_begin, chunk_end);
}

void SoftmaxStats::add_columns(int64_t col_begin, int64_t col_end, Isa isa) {
  SSLK_DISPATCH(isa, softmax_stats_columns, *this, col_begin, col_end);
}

void mirror_rows(float* tile, int64_t stride, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 16;  // whole cache lines, so that each is read once
  for (int64_t i = begin; i < end; i += kBlock) {
    for (int64_t j = 0; j < i + kBlock; j += kBlock) {
      for (int64_t row = i; row < std::min(i + kBlock, end); ++row) {
        for (int64_t col = j; col < std::min(j + kBlock, row); ++col) tile[row * stride + col] = tile[col * stride + row];
      }
    }
  }
}

void softmax_grad(const SoftmaxGrad& grad, int64_t row_begin, int64_t row_end, Isa isa) {
  SSLK_DISPATCH(isa, softmax_grad, grad, row_begin, row_end);
}

}  // namespace sslk
