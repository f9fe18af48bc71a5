#include "softmax.h"

#include <algorithm>
#include <cmath>

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

void softmax_summary(const SoftmaxSummary& s) {
  const double smoothing = s.label_smoothing, share = 1.0 / double(s.n_sides);
  double total = 0, weights[2] = {}, unit = 0;
  *s.unpaired = 0;
  if (s.losses) std::fill(s.losses, s.losses + s.size[0], 0.f);
  const auto include = [&](double weight) {
    if (!(std::abs(weight) <= unit) && unit == unit) unit = std::abs(weight);  // a NaN stays
  };
  for (int64_t i = 0; i < s.n_sides; ++i) {
    int64_t paired = 0;
    double sum = 0;
    for (int64_t k = 0; k < s.size[i]; ++k) {
      const double* stats = s.stats[i] + k * s.width;
      if (stats[3] == 0) continue;
      ++paired;
      double gap = stats[0] - stats[2] / stats[3];
      if (smoothing != 0) gap = (1 - smoothing) * gap + smoothing * (stats[0] - stats[4] / stats[5]);
      const double loss = share * (s.scale * gap + std::log(stats[1]));
      sum += loss;
      if (s.losses) s.losses[k] = float(s.losses[k] + loss);
    }
    *s.unpaired += s.size[i] - paired;
    const double divisor = s.mean && paired > 1 ? double(paired) : 1;
    total += sum / divisor;
    weights[i] = share / divisor;
    if (!s.row_weight && s.size[i]) include(weights[i]);
  }
  if (s.loss) *s.loss = float(total);
  if (s.row_weight) {
    for (int64_t k = 0; k < s.size[0]; ++k) include(share * s.row_weight[k]);
  }
  if (unit == 0) unit = 1;
  *s.unit = float(unit);
  for (int64_t i = 0; i < s.n_sides; ++i) {
    if (!s.side[i]) continue;
    const int64_t size = s.size[i];
    float *top = s.side[i], *log_sum = top + size, *weight = log_sum + size, *target = weight + size;
    for (int64_t k = 0; k < size; ++k) {
      const double* stats = s.stats[i] + k * s.width;
      const double w = stats[3] == 0 ? 0 : (s.row_weight ? share * s.row_weight[k] : weights[i]) / unit;
      top[k] = w == 0 ? 0 : float(stats[0]);
      log_sum[k] = w == 0 ? __builtin_inff() : float(std::log(stats[1]));  // no 0 meets an infinite exponential
      weight[k] = float(w);
      target[k] = float((1 - smoothing) * w / std::max(stats[3], 1.0));
      if (smoothing != 0) target[size + k] = float(smoothing * w / std::max(stats[5], 1.0));
    }
  }
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
