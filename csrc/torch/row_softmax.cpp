// CPU tensors in, the torch-free tile kernels underneath, torch's own thread pool across rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>
#include <vector>

#include "../jobs/row_softmax.h"
#include "parallel.h"
#include "products.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using Maybe = std::optional<Tensor>;

void add_statistics(const sslk::RowStats* prefixes, int64_t count) {
  sslk::over_rows(prefixes->tile.rows, count * prefixes->tile.cols, [&](int64_t begin, int64_t end, sslk::Isa isa) {
    sslk::row_softmax_stats(prefixes, count, begin, end, isa);
  });
}

// Calls body(begin, end, isa) for ranges of the steps of prefixes.
template <typename Body>
void over_steps(const sslk::RowGrad* prefixes, int64_t count, Body body) {
  sslk::over_rows(prefixes->steps(), prefixes->step() * count * prefixes->tile.cols, body);
}

void visit_rows(const sslk::RowVisit& visit) {
  over_steps(visit.grads, visit.count, [&](int64_t begin, int64_t end, sslk::Isa isa) {
    sslk::row_softmax_visit(visit, begin, end, isa);
  });
}

void row_softmax_stats_cpu(std::vector<Tensor> tiles, Tensor stats, Tensor target, Maybe row_ids, Maybe col_ids,
                           int64_t same_id, bool guided, bool logits, double scale, double same_scale,
                           double other_scale, Maybe bias, Maybe row_factors, Maybe col_factors) {
  const auto job = sslk::row_stats_job<Tensor>(tiles, stats,
                                               {target, row_ids, col_ids, same_id, guided, logits, scale, same_scale,
                                                other_scale, bias, row_factors, col_factors});
  add_statistics(job.data(), static_cast<int64_t>(job.size()));
}

void row_softmax_guide_cpu(Tensor tile, Tensor scores, Tensor threshold, Tensor target, Maybe row_ids, Maybe col_ids,
                           int64_t same_id) {
  const auto job = sslk::row_guide_job<Tensor>(
      tile, scores, threshold, {target, row_ids, col_ids, same_id, false, false, 0, 0, 0, {}, {}, {}});
  sslk::over_rows(job.tile.rows, job.tile.cols, [&](int64_t begin, int64_t end, sslk::Isa isa) {
    sslk::row_softmax_guide(job, begin, end, isa);
  });
}

void row_softmax_grad_cpu(std::vector<Tensor> tiles, Tensor moments, Tensor col_sums, Tensor sides, bool write,
                          bool summed, Tensor target, Maybe row_ids, Maybe col_ids, int64_t same_id, bool guided,
                          bool logits, double scale, double same_scale, double other_scale, Maybe bias,
                          Maybe row_factors, Maybe col_factors) {
  const auto job = sslk::row_grad_job<Tensor>(tiles, moments, col_sums,
                                              {target, row_ids, col_ids, same_id, guided, logits, scale, same_scale,
                                               other_scale, bias, row_factors, col_factors},
                                              sides, write);
  const int64_t count = static_cast<int64_t>(job.size());
  over_steps(job.data(), count, [&](int64_t begin, int64_t end, sslk::Isa isa) {
    sslk::row_softmax_grad(job.data(), count, summed, begin, end, isa);
  });
}

void row_softmax_visit_cpu(std::vector<Tensor> tiles, Tensor stats, Tensor moments, Tensor col_sums, Maybe weights,
                           double largest, std::vector<double> shares, double label_smoothing, bool write,
                           Tensor target, Maybe row_ids, Maybe col_ids, int64_t same_id, bool guided, bool logits,
                           double scale, double same_scale, double other_scale, Maybe bias, Maybe row_factors,
                           Maybe col_factors) {
  const auto job = sslk::row_visit_job<Tensor>(tiles, stats, moments, col_sums,
                                               {target, row_ids, col_ids, same_id, guided, logits, scale, same_scale,
                                                other_scale, bias, row_factors, col_factors},
                                               weights, largest, shares, label_smoothing, write);
  visit_rows(job.here());
}

// A loss of one dimension is one of each row.
void summarise(sslk::RowSummary& summary, const Tensor& loss) {
  if (loss.dim() == 1) {
    summary.losses = sslk::output_data(loss, "loss", summary.rows);
  } else {
    sslk::check_tensor(loss, "loss", ScalarType::Float, 0);
    summary.loss = loss.mutable_data_ptr<float>();
  }
  sslk::row_softmax_summary(summary);
}

void row_softmax_summary_cpu(Tensor stats, double unit, double label_smoothing, bool mean, bool lse, Maybe weights,
                             Tensor loss, Tensor largest, Tensor side) {
  sslk::RowSummary summary{};
  summary.rows = stats.size(0);
  summary.width = label_smoothing != 0 ? sslk::kAllRowStats : sslk::kRowStats;
  summary.stats = sslk::stats_data(stats, "stats", summary.rows, summary.width);
  summary.unit = unit;
  summary.label_smoothing = label_smoothing;
  summary.mean = mean;
  summary.lse = lse;
  summary.weight = sslk::vector_data(weights, "weights", summary.rows);
  summary.largest = sslk::output_data(largest, "largest", 1);
  sslk::check_tensor(side, "side", ScalarType::Float, 2);
  STD_TORCH_CHECK(side.is_contiguous() && side.size(1) == summary.rows &&
                      (side.size(0) == 0 || side.size(0) == (label_smoothing != 0 ? 5 : 4)),
                  "side: expected contiguous [4, ", summary.rows, "], [5, ", summary.rows,
                  "] with label smoothing, or no vectors");
  summary.side = side.size(0) ? side.mutable_data_ptr<float>() : nullptr;
  summarise(summary, loss);
}

// All of a forward pass whose similarities are one tile: both passes over it, and the products. Returns the loss; the
// gradients of x and y (empty where not wanted); that of the scale and the largest weight, to be multiplied by all of
// them; and the gradient of the bias.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_softmax_of_one_tile_cpu(
    Tensor x, Tensor y, Maybe weights, double label_smoothing, bool mean, bool want_dx, bool want_dy, bool want_scale,
    bool want_bias, Tensor target, Maybe row_ids, Maybe col_ids, int64_t same_id, bool logits, double scale,
    double same_scale, double other_scale, Maybe bias) {
  using torch::stable::new_empty;
  const bool any = want_dx || want_dy || want_scale || want_bias;
  const Tensor tile = sslk::product(x, sslk::transposed(y));
  const sslk::RowPairs<Tensor> pairs{target, row_ids,    col_ids,     same_id, false, logits,
                                     scale,  same_scale, other_scale, bias,    {},    {}};
  const int64_t rows = tile.size(0), cols = tile.size(1);
  const int64_t width = label_smoothing != 0 ? sslk::kAllRowStats : sslk::kRowStats;

  std::vector<double> stats(rows * width);
  for (int64_t i = 0; i < rows; ++i) stats[i * width] = -std::numeric_limits<double>::infinity();
  const sslk::RowTile row_tile = sslk::row_tile(tile, pairs);
  const sslk::RowStats whole{row_tile, stats.data(), width, nullptr};
  std::vector<float> col_sums(want_bias ? sslk::RowGrad::chunks(rows) * cols : 0);
  std::vector<double> moments(rows);
  if (any) {
    sslk::RowGrad grad{};
    grad.tile = row_tile;
    grad.moments = moments.data();
    grad.moment_stride = 1;
    grad.col_sums = want_bias ? col_sums.data() : nullptr;
    grad.write = want_dx || want_dy;
    const double share = 1;
    sslk::RowVisit visit{};
    visit.stats = &whole;
    visit.grads = &grad;
    visit.count = 1;
    visit.weight = sslk::vector_data(weights, "weights", rows);
    visit.largest = sslk::largest_weight(visit.weight, rows);
    visit.shares = &share;
    visit.label_smoothing = label_smoothing;
    visit_rows(visit);
  } else {
    add_statistics(&whole, 1);
  }

  Tensor loss = new_empty(x, {}), scalars = new_empty(x, {3});
  float* factors = scalars.mutable_data_ptr<float>();
  factors[0] = factors[1] = 0;
  sslk::RowSummary summary{};
  summary.stats = stats.data();
  summary.rows = rows;
  summary.width = width;
  summary.unit = row_tile.unit();
  summary.label_smoothing = label_smoothing;
  summary.mean = mean;
  summary.weight = sslk::vector_data(weights, "weights", rows);
  summary.largest = factors + 2;
  summarise(summary, loss);

  Tensor dx = new_empty(x, {0, x.size(1)}), dy = new_empty(x, {0, x.size(1)});
  Tensor dbias = new_empty(x, {want_bias ? cols : 0});
  if (any) {
    double moment = 0;
    for (double value : moments) moment += value;
    factors[0] = static_cast<float>(moment);
    float* by_bias = dbias.mutable_data_ptr<float>();
    for (int64_t j = 0; want_bias && j < cols; ++j) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < sslk::RowGrad::chunks(rows); ++chunk) sum += col_sums[chunk * cols + j];
      by_bias[j] = static_cast<float>(sum);
    }
    if (want_dx) dx = sslk::product(tile, y);
    if (want_dy) dy = sslk::product(sslk::transposed(tile), x);
  }
  return {loss, dx, dy, scalars, dbias};
}

}  // namespace

#define SSLK_PAIRS \
  "Tensor target, Tensor? row_ids, Tensor? col_ids, int same_id, bool guided, bool logits, float scale, " \
  "float same_scale, float other_scale, Tensor? bias, Tensor? row_factors, Tensor? col_factors"

STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m) {
  m.def("row_softmax_stats_(Tensor(a!)[] tiles, Tensor(b!) stats, " SSLK_PAIRS ") -> ()");
  m.def(
      "row_softmax_guide_(Tensor(a!) tile, Tensor scores, Tensor threshold, Tensor target, Tensor? row_ids, "
      "Tensor? col_ids, int same_id) -> ()");
  m.def(
      "row_softmax_grad_(Tensor(a!)[] tiles, Tensor(b!) moments, Tensor(c!) col_sums, Tensor sides, bool write, "
      "bool summed, " SSLK_PAIRS ") -> ()");
  m.def(
      "row_softmax_visit_(Tensor(a!)[] tiles, Tensor(b!) stats, Tensor(c!) moments, Tensor(d!) col_sums, "
      "Tensor? weights, float largest, float[] shares, float label_smoothing, bool write, " SSLK_PAIRS ") -> ()");
  m.def(
      "row_softmax_summary_(Tensor stats, float unit, float label_smoothing, bool mean, bool lse, Tensor? weights, "
      "Tensor(a!) loss, Tensor(b!) largest, Tensor(c!) side) -> ()");
  m.def(
      "row_softmax_of_one_tile(Tensor x, Tensor y, Tensor? weights, float label_smoothing, bool mean, bool want_dx, "
      "bool want_dy, bool want_scale, bool want_bias, Tensor target, Tensor? row_ids, Tensor? col_ids, int same_id, "
      "bool logits, float scale, float same_scale, float other_scale, Tensor? bias) -> (Tensor loss, Tensor dx, "
      "Tensor dy, Tensor scalars, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) {
  m.impl("row_softmax_stats_", TORCH_BOX(&row_softmax_stats_cpu));
  m.impl("row_softmax_guide_", TORCH_BOX(&row_softmax_guide_cpu));
  m.impl("row_softmax_grad_", TORCH_BOX(&row_softmax_grad_cpu));
  m.impl("row_softmax_visit_", TORCH_BOX(&row_softmax_visit_cpu));
  m.impl("row_softmax_summary_", TORCH_BOX(&row_softmax_summary_cpu));
  m.impl("row_softmax_of_one_tile", TORCH_BOX(&row_softmax_of_one_tile_cpu));
}
