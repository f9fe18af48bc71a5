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
                      Tensor row_top, Tensor col_top, Tensor row_log_sum, Tensor col_log_sum, Tensor row_weight,
                      Tensor col_weight, Tensor row_target, Tensor col_target, std::optional<Tensor> row_uniform,
                      std::optional<Tensor> col_uniform, bool write) {
  STD_TORCH_CHECK(row_uniform.has_value() == col_uniform.has_value(), "row_uniform, col_uniform: expected both or neither");
  sslk::SoftmaxGrad grad{};
  grad.tile = make_tile(tile, scale, row_ids, col_ids, ignore_same_id, positive, excluded);
  const int64_t rows = grad.tile.rows, cols = grad.tile.cols;
  grad.stats = stats_data(stats, "stats", rows, 1);
  grad.row = {sslk::vector_data(row_top, "row_top", rows), sslk::vector_data(row_log_sum, "row_log_sum", rows),
              sslk::vector_data(row_weight, "row_weight", rows), sslk::vector_data(row_target, "row_target", rows),
              sslk::vector_data(row_uniform, "row_uniform", rows)};
  grad.col = {sslk::vector_data(col_top, "col_top", cols), sslk::vector_data(col_log_sum, "col_log_sum", cols),
              sslk::vector_data(col_weight, "col_weight", cols), sslk::vector_data(col_target, "col_target", cols),
              sslk::vector_data(col_uniform, "col_uniform", cols)};
  grad.write = write;
  const sslk::Isa isa = sslk::active_isa();
  torch::stable::parallel_for(0, rows, kElementsPerTask / (cols > 0 ? cols : 1) + 1,
                              [&](int64_t begin, int64_t end) { sslk::softmax_grad(grad, begin, end, isa); });
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
      "bool ignore_same_id, int positive, int excluded, Tensor row_top, Tensor col_top, Tensor row_log_sum, "
      "Tensor col_log_sum, Tensor row_weight, Tensor col_weight, Tensor row_target, Tensor col_target, "
      "Tensor? row_uniform, Tensor? col_uniform, bool write) -> ()");
  m.def("mirror_(Tensor(a!) tile) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) {
  m.impl("softmax_stats_", TORCH_BOX(&softmax_stats_cpu));
  m.impl("softmax_grad_", TORCH_BOX(&softmax_grad_cpu));
  m.impl("mirror_", TORCH_BOX(&mirror_cpu));
}
