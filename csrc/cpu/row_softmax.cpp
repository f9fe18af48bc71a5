#include "row_softmax.h"

#include <algorithm>
#include <cmath>
#include <vector>

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

void row_softmax_visit(const RowVisit& visit, int64_t begin, int64_t end, Isa isa) {
  const int64_t cols = visit.grads->tile.cols;
  std::vector<float> exps(visit.count * cols);
  std::vector<RowKept> kept(visit.count);
  for (int64_t k = 0; k < visit.count; ++k) kept[k].exps = exps.data() + k * cols;
  SSLK_DISPATCH(isa, row_softmax_visit, visit, kept.data(), begin, end);
}

namespace {

// Whether a row counts: it has a positive.
bool counts(const double* stats) { return stats[3] != 0; }

double loss_of_row(const double* stats, double unit, double label_smoothing) {
  if (!counts(stats)) return 0;
  double gap = stats[0] - stats[2] / stats[3];
  if (label_smoothing != 0) gap = (1 - label_smoothing) * gap + label_smoothing * (stats[0] - stats[4] / stats[5]);
  return unit * gap + std::log(stats[1]);
}

double log_sum_exp(const double* stats, double unit) {
  return stats[1] != 0 ? unit * stats[0] + std::log(stats[1]) : -INFINITY;
}

RowSide side_of_row(const double* stats, double weight, double label_smoothing) {
  if (weight == 0) return {0, INFINITY, 0, 0, 0};  // no 0 meets an infinite exponential
  RowSide side{};
  side.top = float(stats[0]);
  side.log_sum = float(std::log(stats[1]));
  side.weight = float(weight);
  side.target = float((1 - label_smoothing) * weight / std::max(stats[3], 1.0));
  if (label_smoothing != 0) side.all = float(label_smoothing * weight / std::max(stats[5], 1.0));
  return side;
}

}  // namespace

double largest_weight(const float* weight, int64_t rows) {
  double largest = 0;
  for (int64_t row = 0; weight && row < rows; ++row) {
    const double size = std::abs(double(weight[row]));
    if (!(size <= largest) && largest == largest) largest = size;  // a NaN stays
  }
  return largest == 0 ? 1 : largest;
}

void RowVisit::keep(RowKept& kept, int64_t k, int64_t row) const {
  const double* s = stats[k].stats + row * stats[k].width;
  const double w = counts(s) ? shares[k] * (weight ? weight[row] : 1) / largest : 0;
  kept.side = side_of_row(s, w, label_smoothing);
  kept.least = float(2e-35 * s[1]);
  kept.inverse = w == 0 ? 0 : float(1 / s[1] + (s[0] - s[0]));  // NaN where the largest is not finite
}

void row_softmax_summary(const RowSummary& s) {
  const double smoothing = s.label_smoothing;
  const auto weight_of = [&](int64_t row) { return s.weight ? double(s.weight[row]) : 1; };
  const auto is_counted = [&](const double* stats) { return s.lse ? stats[1] != 0 : counts(stats); };
  int64_t counted = 0;
  double total = 0;
  for (int64_t row = 0; row < s.rows; ++row) {
    const double* stats = s.stats + row * s.width;
    const double of_row = s.lse ? log_sum_exp(stats, s.unit) : loss_of_row(stats, s.unit, smoothing);
    const double weight = weight_of(row), loss = weight == 0 ? 0 : weight * of_row;
    counted += is_counted(stats);
    total += loss;
    if (s.losses) s.losses[row] = float(loss);
  }
  const double divisor = s.mean && counted > 1 ? double(counted) : 1;
  if (s.loss) *s.loss = float(total / divisor);
  const double largest = largest_weight(s.weight, s.rows);
  *s.largest = float(largest / divisor);
  if (!s.side) return;
  float *top = s.side, *log_sum = top + s.rows, *weight = log_sum + s.rows, *target = weight + s.rows;
  for (int64_t row = 0; row < s.rows; ++row) {
    const double* stats = s.stats + row * s.width;
    const RowSide side = side_of_row(stats, is_counted(stats) ? weight_of(row) / largest : 0, smoothing);
    top[row] = side.top;
    log_sum[row] = side.log_sum;
    weight[row] = side.weight;
    target[row] = s.lse ? 0 : side.target;
    if (smoothing != 0) target[s.rows + row] = side.all;
  }
}

}  // namespace sslk
