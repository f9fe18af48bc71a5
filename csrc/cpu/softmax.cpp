#include "softmax.h"

#include <cmath>

namespace sslk {

// lse = scale * raw + rest in two floats: scale * (x - raw) - rest keeps the digits that a single float of the size of
// lse would drop, 1e-5 of a probability at scale 100.
struct SplitLse {
  float raw, rest;
};

static inline SplitLse split_lse(double lse, float scale) {
  const float quotient = static_cast<float>(lse / scale);
  const float raw = std::isfinite(quotient) ? quotient : 0.f;  // infinite at a scale of 0, or next to it
  return {raw, static_cast<float>(lse - static_cast<double>(scale) * raw)};
}

}  // namespace sslk

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

void softmax_grad_prepare(SoftmaxGrad& grad) {
  grad.col_lse_raw.resize(grad.tile.cols);
  grad.col_lse_rest.resize(grad.tile.cols);
  for (int64_t col = 0; col < grad.tile.cols; ++col) {
    const SplitLse lse = split_lse(grad.col.lse[col], grad.tile.scale);
    grad.col_lse_raw[col] = lse.raw;
    grad.col_lse_rest[col] = lse.rest;
  }
}

void softmax_grad(const SoftmaxGrad& grad, int64_t row_begin, int64_t row_end, Isa isa) {
  SSLK_DISPATCH(isa, softmax_grad, grad, row_begin, row_end);
}

}  // namespace sslk
