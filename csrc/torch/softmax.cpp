// CPU tensors in, the torch-free tile kernels underneath, torch's own thread pool across rows and columns.
#include "../cpu/softmax.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

sslk::SoftmaxTile make_tile(Tensor& tile, double scale, const std::optional<Tensor>& row_ids,
                            const std::optional<Tensor>& col_ids, bool ignore_same_id, int64_t positive,
                            int64_t excluded) {
  sslk::check_tile(tile, "tile");
  STD_TORCH_CHECK(scale >= 0 || scale != scale, "scale: expected a number >= 0, got ", scale);
  STD_TORCH_CHECK(row_ids.has_value() == col_ids.has_value(), "row_ids, col_ids: expected both or neither");
  sslk::SoftmaxTile result{};
  result.raw = tile.mutable_data_ptr<float>();
  result.rows = tile.size(0);
  result.cols = tile.size(1);
  result.row_stride = tile.stride(0);
  result.scale = static_cast<float>(scale);
  result.row_ids = sslk::check_ids(row_ids, "row_ids", result.rows);
  result.col_ids = sslk::check_ids(col_ids, "col_ids", result.cols);
  result.ignore_same_id = ignore_same_id;
  result.positive = positive;
  result.excluded = excluded;
  return result;
}

double* stats_data(const Tensor& stats, const char* name, int64_t rows, int64_t width) {
  sslk::check_tensor(stats, name, ScalarType::Double, 2);
  sslk::check_size(stats, name, 0, rows);
  sslk::check_size(stats, name, 1, width);
  STD_TORCH_CHECK(stats.is_contiguous(), name, ": expected a contiguous tensor");
  return stats.mutable_data_ptr<double>();
}

// The vectors of a side, [4, size] or with label smoothing [5, size].
sslk::SoftmaxGrad::Side side_of(const Tensor& side, const char* name, int64_t size) {
  sslk::check_tensor(side, name, ScalarType::Float, 2);
  sslk::check_size(side, name, 1, size);
  STD_TORCH_CHECK(side.size(0) == 4 || side.size(0) == 5, name, ": expected 4 or 5 vectors, got ", side.size(0));
  STD_TORCH_CHECK(size <= 1 || side.stride(1) == 1, name, ": expected vectors that are contiguous in memory");
  const float* data = side.const_data_ptr<float>();
  const int64_t stride = side.stride(0);
  return {data, data + stride, data + 2 * stride, data + 3 * stride, side.size(0) == 5 ? data + 4 * stride : nullptr};
}

constexpr int64_t kElementsPerTask = 16384;  // about 10 us of work, so that small tiles stay on one thread

void softmax_stats_cpu(Tensor tile, Tensor row_stats, std::optional<Tensor> col_stats, double scale,
                       std::optional<Tensor> row_ids, std::optional<Tensor> col_ids, bool ignore_same_id,
                       int64_t positive, int64_t excluded) {
  const auto pairs = make_tile(tile, scale, row_ids, col_ids, ignore_same_id, positive, excluded);
  const bool uniform = row_stats.dim() == 2 && row_stats.size(1) == sslk::kUniformStats;
  const int64_t width = uniform ? sslk::kUniformStats : sslk::kStats;
  double* rows = stats_data(row_stats, "row_stats", pairs.rows, width);
  double* cols = col_stats ? stats_data(*col_stats, "col_stats", pairs.cols, width) : nullptr;
  sslk::SoftmaxStats stats(pairs, rows, cols, uniform);
  const sslk::Isa isa = sslk::active_isa();
  const int64_t chunk_elements = sslk::SoftmaxStats::kChunk * (pairs.cols > 0 ? pairs.cols : 1);
  torch::stable::parallel_for(0, stats.chunks(), kElementsPerTask / chunk_elements + 1,
                              [&](int64_t begin, int64_t end) { stats.add_rows(begin, end, isa); });
  if (!cols) return;
  // Columns go to threads by whole vectors, whose neighbours are summed again together.
  const int64_t group = 64, groups = (pairs.cols + group - 1) / group;
  torch::stable::parallel_for(0, groups, kElementsPerTask / (group * (pairs.rows > 0 ? pairs.rows : 1)) + 1,
                              [&](int64_t begin, int64_t end) {
                                const int64_t last = end * group < pairs.cols ? end * group : pairs.cols;
                                stats.add_columns(begin * group, last, isa);
                              });
}

void softmax_grad_cpu(Tensor tile, Tensor stats, double scale, std::optional<Tensor> row_ids,
                      std::optional<Tensor> col_ids, bool ignore_same_id, int64_t positive, int64_t excluded,
                      Tensor row_side, Tensor col_side, bool write) {
  STD_TORCH_CHECK(row_side.size(0) == col_side.size(0), "row_side, col_side: expected the same number of vectors");
  sslk::SoftmaxGrad grad{};
  grad.tile = make_tile(tile, scale, row_ids, col_ids, ignore_same_id, positive, excluded);
  const int64_t rows = grad.tile.rows, cols = grad.tile.cols;
  grad.stats = stats_data(stats, "stats", rows, 1);
  grad.row = side_of(row_side, "row_side", rows);
  grad.col = side_of(col_side, "col_side", cols);
  grad.write = write;
  const sslk::Isa isa = sslk::active_isa();
  torch::stable::parallel_for(0, rows, kElementsPerTask / (cols > 0 ? cols : 1) + 1,
                              [&](int64_t begin, int64_t end) { sslk::softmax_grad(grad, begin, end, isa); });
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
    summary.stats[i] = stats_data(stats[i], "stats", size, summary.width);
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
  torch::stable::parallel_for(0, size, kElementsPerTask / (size > 0 ? size : 1) + 1, [&](int64_t begin, int64_t end) {
    sslk::mirror_rows(data, stride, begin, end);
  });
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
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) {
  m.impl("softmax_stats_", TORCH_BOX(&softmax_stats_cpu));
  m.impl("softmax_grad_", TORCH_BOX(&softmax_grad_cpu));
  m.impl("softmax_summary_", TORCH_BOX(&softmax_summary_cpu));
  m.impl("mirror_", TORCH_BOX(&mirror_cpu));
}
