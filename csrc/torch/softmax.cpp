// CPU tensors in, the torch-free tile kernels underneath, torch's own thread pool across rows and columns.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>
#include <vector>

#include "../jobs/softmax.h"
#include "parallel.h"
#include "products.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void add_tile(sslk::SoftmaxStats& stats) {
  const int64_t rows = stats.tile.rows, cols = stats.tile.cols;
  const sslk::Isa isa = sslk::active_isa();
  torch::stable::parallel_for(0, stats.chunks(), sslk::grain(sslk::SoftmaxStats::kChunk * cols),
                              [&](int64_t begin, int64_t end) { stats.add_rows(begin, end, isa); });
  if (!stats.col_stats) return;
  // Columns go to threads by whole vectors, whose neighbours are summed again together.
  const int64_t group = 64, groups = (cols + group - 1) / group;
  torch::stable::parallel_for(0, groups, sslk::grain(group * rows),
                              [&](int64_t begin, int64_t end) {
                                const int64_t last = end * group < cols ? end * group : cols;
                                stats.add_columns(begin * group, last, isa);
                              });
}

void make_gradient(const sslk::SoftmaxGrad& grad) {
  sslk::over_rows(grad.tile.rows, grad.tile.cols, [&](int64_t begin, int64_t end, sslk::Isa isa) {
    sslk::softmax_grad(grad, begin, end, isa);
  });
}

void softmax_stats_cpu(Tensor tile, Tensor row_stats, std::optional<Tensor> col_stats, double scale,
                       std::optional<Tensor> row_ids, std::optional<Tensor> col_ids, bool ignore_same_id,
                       int64_t positive, int64_t excluded) {
  auto stats =
      sslk::softmax_stats_job(tile, row_stats, col_stats, scale, row_ids, col_ids, ignore_same_id, positive, excluded);
  add_tile(stats);
}

void softmax_grad_cpu(Tensor tile, Tensor stats, double scale, std::optional<Tensor> row_ids,
                      std::optional<Tensor> col_ids, bool ignore_same_id, int64_t positive, int64_t excluded,
                      Tensor row_side, Tensor col_side, bool write) {
  make_gradient(sslk::softmax_grad_job(tile, stats, scale, row_ids, col_ids, ignore_same_id, positive, excluded, row_side,
                                       col_side, write));
}

void softmax_summary_cpu(std::vector<Tensor> stats, double scale, double label_smoothing, bool mean,
                         std::optional<Tensor> row_weight, Tensor loss, Tensor unpaired, Tensor scalars,
                         std::vector<Tensor> sides) {
  STD_TORCH_CHECK(stats.size() == sides.size() && (stats.size() == 1 || stats.size() == 2),
                  "stats, sides: expected as many, 1 or 2, got ", stats.size(), " and ", sides.size());
  sslk::SoftmaxSummary summary{};
  summary.width = label_smoothing != 0 ? sslk::kUniformStats : sslk::kStats;
  summary.n_sides = int64_t(stats.size());
  for (int64_t i = 0; i < summary.n_sides; ++i) {
    const int64_t size = stats[i].size(0);
    summary.stats[i] = sslk::stats_data(stats[i], "stats", size, summary.width);
    summary.size[i] = size;
    sslk::check_tensor(sides[i], "sides", ScalarType::Float, 2);
    STD_TORCH_CHECK(sides[i].is_contiguous() && sides[i].size(1) == size &&
                        (sides[i].size(0) == 0 || sides[i].size(0) == (label_smoothing != 0 ? 5 : 4)),
                    "sides: expected contiguous [4, ", size, "], [5, ", size, "] with label smoothing, or no rows");
    summary.side[i] = sides[i].size(0) ? sides[i].mutable_data_ptr<float>() : nullptr;
  }
  summary.scale = scale;
  summary.label_smoothing = label_smoothing;
  summary.mean = mean;
  for (int64_t i = 0; i < summary.n_sides; ++i) {
    summary.row_weight = sslk::vector_data(row_weight, "row_weight", summary.size[i]);
  }
  if (loss.dim() == 1) {
    for (int64_t i = 0; i < summary.n_sides; ++i) sslk::check_size(loss, "loss", 0, summary.size[i]);
    summary.losses = sslk::output_data(loss, "loss", summary.size[0]);
  } else {
    sslk::check_tensor(loss, "loss", ScalarType::Float, 0);
    summary.loss = loss.mutable_data_ptr<float>();
  }
  sslk::check_tensor(unpaired, "unpaired", ScalarType::Long, 0);
  summary.unpaired = unpaired.mutable_data_ptr<int64_t>();
  float* factors = sslk::output_data(scalars, "scalars", 3);
  factors[0] = factors[1] = 0;
  summary.unit = factors + 2;
  sslk::softmax_summary(summary);
}

void mirror_cpu(Tensor tile) {
  sslk::check_tile(tile, "tile");
  const int64_t size = tile.size(0), stride = tile.stride(0);
  sslk::check_size(tile, "tile", 1, size);
  float* data = tile.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, size, sslk::grain(size), [&](int64_t begin, int64_t end) {
    sslk::mirror_rows(data, stride, begin, end);
  });
}

// All of a forward pass whose similarities are one tile: both passes over it, and the products. Without y the rows of x
// meet each other, and with a seam so do those of equal place before and after it, as positive pairs. Returns the loss,
// the gradients of x and y (empty where not wanted), the scalars of a Result, and the number of unpaired.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> softmax_of_one_tile_cpu(
    Tensor x, std::optional<Tensor> y, double scale, std::optional<Tensor> x_ids, std::optional<Tensor> y_ids,
    bool ignore_same_id, int64_t positive, int64_t excluded, int64_t seam, double label_smoothing, bool mean,
    bool want_dx, bool want_dy, bool want_dscale) {
  using torch::stable::new_empty;
  STD_TORCH_CHECK(seam <= 0 || (!y && !x_ids && !y_ids), "seam: expected neither y nor ids beside it, got ", seam);
  const bool uniform = label_smoothing != 0;
  const int64_t width = uniform ? sslk::kUniformStats : sslk::kStats, n_sides = y ? 2 : 1;
  Tensor tile = sslk::product(x, sslk::transposed(y ? *y : x));
  if (!y) mirror_cpu(tile);
  sslk::SoftmaxTile pairs = sslk::softmax_tile(tile, scale, x_ids, y_ids, ignore_same_id, positive, excluded);
  std::vector<int64_t> views;
  if (seam > 0) {
    views.resize(pairs.rows);
    for (int64_t i = 0; i < pairs.rows; ++i) views[i] = i % seam;
    pairs.row_ids = pairs.col_ids = views.data();
    pairs.positive = sslk::kNoDiagonal;
  }

  const int64_t size[2] = {pairs.rows, y ? pairs.cols : 0}, both = size[0] + size[1];
  std::vector<double> stats(both * width);
  for (int64_t i = 0; i < both; ++i) stats[i * width] = -std::numeric_limits<double>::infinity();
  double* stats_of[2] = {stats.data(), stats.data() + size[0] * width};
  sslk::SoftmaxStats tile_stats(pairs, stats_of[0], y ? stats_of[1] : nullptr, uniform);
  add_tile(tile_stats);

  Tensor loss = new_empty(x, {}), unpaired = new_empty(x, {}, ScalarType::Long), scalars = new_empty(x, {3});
  float* factors = scalars.mutable_data_ptr<float>();
  factors[0] = factors[1] = 0;
  const bool wanted = want_dx || want_dy || want_dscale;
  const int64_t planes = uniform ? 5 : 4;
  std::vector<float> sides(wanted ? planes * both : 0);
  sslk::SoftmaxSummary summary{};
  summary.n_sides = n_sides;
  summary.width = width;
  summary.scale = scale;
  summary.label_smoothing = label_smoothing;
  summary.mean = mean;
  summary.loss = loss.mutable_data_ptr<float>();
  summary.unpaired = unpaired.mutable_data_ptr<int64_t>();
  summary.unit = factors + 2;
  sslk::SoftmaxGrad grad{};
  sslk::SoftmaxGrad::Side* side_of_grad[2] = {&grad.row, &grad.col};
  for (int64_t i = 0; i < n_sides; ++i) {
    float* side = wanted ? sides.data() + i * planes * size[0] : nullptr;
    summary.stats[i] = stats_of[i];
    summary.size[i] = size[i];
    summary.side[i] = side;
    if (side) {
      const int64_t n = size[i];
      *side_of_grad[i] = {side, side + n, side + 2 * n, side + 3 * n, uniform ? side + 4 * n : nullptr};
    }
  }
  sslk::softmax_summary(summary);

  Tensor dx = new_empty(x, {0, x.size(1)}), dy = new_empty(x, {0, x.size(1)});
  if (wanted) {
    if (!y) grad.col = grad.row;
    std::vector<double> moments(pairs.rows);
    grad.tile = pairs;
    grad.stats = moments.data();
    grad.write = want_dx || want_dy;
    make_gradient(grad);
    double moment = 0;
    for (double value : moments) moment += value;
    factors[0] = static_cast<float>(moment / (y ? 1 : 2));  // a symmetric tile holds every pair both ways
    if (want_dx) dx = sslk::product(tile, y ? *y : x);
    if (want_dy && y) dy = sslk::product(sslk::transposed(tile), x);
  }
  return {loss, dx, dy, scalars, unpaired};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m) {
  m.def(
      "softmax_stats_(Tensor tile, Tensor(a!) row_stats, Tensor(b!)? col_stats, float scale, Tensor? row_ids, "
      "Tensor? col_ids, bool ignore_same_id, int positive, int excluded) -> ()");
  m.def(
      "softmax_grad_(Tensor(a!) tile, Tensor(b!) stats, float scale, Tensor? row_ids, Tensor? col_ids, "
      "bool ignore_same_id, int positive, int excluded, Tensor row_side, Tensor col_side, bool write) -> ()");
  m.def(
      "softmax_summary_(Tensor[] stats, float scale, float label_smoothing, bool mean, Tensor? row_weight, "
      "Tensor(a!) loss, Tensor(b!) unpaired, Tensor(c!) scalars, Tensor(d!)[] sides) -> ()");
  m.def("mirror_(Tensor(a!) tile) -> ()");
  m.def(
      "softmax_of_one_tile(Tensor x, Tensor? y, float scale, Tensor? x_ids, Tensor? y_ids, bool ignore_same_id, "
      "int positive, int excluded, int seam, float label_smoothing, bool mean, bool want_dx, bool want_dy, "
      "bool want_dscale) -> (Tensor loss, Tensor dx, Tensor dy, Tensor scalars, Tensor unpaired)");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) {
  m.impl("softmax_stats_", TORCH_BOX(&softmax_stats_cpu));
  m.impl("softmax_grad_", TORCH_BOX(&softmax_grad_cpu));
  m.impl("softmax_summary_", TORCH_BOX(&softmax_summary_cpu));
  m.impl("mirror_", TORCH_BOX(&mirror_cpu));
  m.impl("softmax_of_one_tile", TORCH_BOX(&softmax_of_one_tile_cpu));
}
