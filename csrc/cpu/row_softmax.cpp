#include "row_softmax.h"

#include <algorithm>
#include <cmath>

#define SSLK_KERNEL "row_softmax-inl.h"
#include "foreach_isa.h"

namespace sslk {

void row_softmax_stats(const RowStats* prefixes, int64_t count, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, row_softmax_stats, prefixes, count, begin, end);
}

void row_softmax_guide(const RowGuide& guide, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, row_softmax_guide, guide, begin, end);
}

void row_softmax_grad(const RowGrad* prefixes, int64_t count, bool summed, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, row_softmax_grad, prefixes, count, summed, begin, end);
}

namespace {

// Whether a row counts: it has a positive; of a log-sum-exp, it has a pair at all.
bool counts(const RowSummary& s, const double* stats) { return s.lse ? stats[1] != 0 : stats[3] != 0; }

double loss_of_row(const RowSummary& s, const double* stats) {
  if (s.lse) return counts(s, stats) ? s.unit * stats[0] + std::log(stats[1]) : -INFINITY;
  if (!counts(s, stats)) return 0;
  double gap = stats[0] - stats[2] / stats[3];
  if (s.label_smoothing != 0) {
    gap = (1 - s.label_smoothing) * gap + s.label_smoothing * (stats[0] - stats[4] / stats[5]);
  }
  return s.unit * gap + std::log(stats[1]);
}

}  // namespace

void row_softmax_summary(const RowSummary& s) {
  const double smoothing = s.label_smoothing;
  const auto weight_of = [&](int64_t row) { return s.weight ? double(s.weight[row]) : 1; };
  int64_t counted = 0;
  double total = 0, largest = 0;
  for (int64_t row = 0; row < s.rows; ++row) {
    const double* stats = s.stats + row * s.width;
    const double weight = weight_of(row), loss = weight == 0 ? 0 : weight * loss_of_row(s, stats);
    counted += counts(s, stats);
    total += loss;
    if (s.losses) s.losses[row] = float(loss);
    if (!(std::abs(weight) <= largest) && largest == largest) largest = std::abs(weight);  // a NaN stays
  }
  const double divisor = s.mean && counted > 1 ? double(counted) : 1;
  if (s.loss) *s.loss = float(total / divisor);
  if (largest == 0) largest = 1;
  *s.largest = float(largest / divisor);
  if (!s.side) return;
  float *top = s.side, *log_sum = top + s.rows, *weight = log_sum + s.rows, *target = weight + s.rows;
  for (int64_t row = 0; row < s.rows; ++row) {
    const double* stats = s.stats + row * s.width;
    const double w = counts(s, stats) ? weight_of(row) / largest : 0;
    top[row] = w == 0 ? 0 : float(stats[0]);
    log_sum[row] = w == 0 ? INFINITY : float(std::log(stats[1]));  // no 0 meets an infinite exponential
    weight[row] = float(w);
    target[row] = s.lse ? 0 : float((1 - smoothing) * w / std::max(stats[3], 1.0));
    if (smoothing != 0) target[s.rows + row] = float(smoothing * w / std::max(stats[5], 1.0));
  }
}

}  // namespace sslk
