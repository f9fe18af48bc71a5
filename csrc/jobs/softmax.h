// Arguments of the softmax losses, checked and as their kernels take them.
#pragma once

#include "../checks.h"
#include "../cpu/softmax.h"

namespace sslk {

template <typename Tensor>
SoftmaxTile softmax_tile(const Tensor& tile, double scale, const std::optional<Tensor>& row_ids,
                         const std::optional<Tensor>& col_ids, bool ignore_same_id, int64_t positive,
                         int64_t excluded) {
  check_tile(tile, "tile");
  STD_TORCH_CHECK(scale >= 0 || scale != scale, "scale: expected a number >= 0, got ", scale);
  STD_TORCH_CHECK(row_ids.has_value() == col_ids.has_value(), "row_ids, col_ids: expected both or neither");
  SoftmaxTile result{};
  result.raw = static_cast<float*>(tile.mutable_data_ptr());
  result.rows = tile.size(0);
  result.cols = tile.size(1);
  result.row_stride = tile.stride(0);
  result.scale = static_cast<float>(scale);
  result.row_ids = check_ids(row_ids, "row_ids", result.rows);
  result.col_ids = check_ids(col_ids, "col_ids", result.cols);
  result.ignore_same_id = ignore_same_id;
  result.positive = positive;
  result.excluded = excluded;
  return result;
}

template <typename Tensor>
SoftmaxStats softmax_stats_job(const Tensor& tile, const Tensor& row_stats, const std::optional<Tensor>& col_stats,
                               double scale, const std::optional<Tensor>& row_ids,
                               const std::optional<Tensor>& col_ids, bool ignore_same_id, int64_t positive,
                               int64_t excluded) {
  const auto pairs = softmax_tile(tile, scale, row_ids, col_ids, ignore_same_id, positive, excluded);
  const bool uniform = row_stats.dim() == 2 && row_stats.size(1) == kUniformStats;
  const int64_t width = uniform ? kUniformStats : kStats;
  double* rows = stats_data(row_stats, "row_stats", pairs.rows, width);
  double* cols = col_stats ? stats_data(*col_stats, "col_stats", pairs.cols, width) : nullptr;
  return SoftmaxStats(pairs, rows, cols, uniform);
}

// The vectors of a side, [4, size] or with label smoothing [5, size].
template <typename Tensor>
SoftmaxGrad::Side softmax_side(const Tensor& side, const char* name, int64_t size) {
  check_tensor(side, name, torch::headeronly::ScalarType::Float, 2);
  check_size(side, name, 1, size);
  STD_TORCH_CHECK(side.size(0) == 4 || side.size(0) == 5, name, ": expected 4 or 5 vectors, got ", side.size(0));
  STD_TORCH_CHECK(size <= 1 || side.stride(1) == 1, name, ": expected vectors that are contiguous in memory");
  const float* data = static_cast<const float*>(side.const_data_ptr());
  const int64_t stride = side.stride(0);
  return {data, data + stride, data + 2 * stride, data + 3 * stride, side.size(0) == 5 ? data + 4 * stride : nullptr};
}

template <typename Tensor>
SoftmaxGrad softmax_grad_job(const Tensor& tile, const Tensor& stats, double scale,
                             const std::optional<Tensor>& row_ids, const std::optional<Tensor>& col_ids,
                             bool ignore_same_id, int64_t positive, int64_t excluded, const Tensor& row_side,
                             const Tensor& col_side, bool write) {
  STD_TORCH_CHECK(row_side.size(0) == col_side.size(0), "row_side, col_side: expected the same number of vectors");
  SoftmaxGrad grad{};
  grad.tile = softmax_tile(tile, scale, row_ids, col_ids, ignore_same_id, positive, excluded);
  grad.stats = stats_data(stats, "stats", grad.tile.rows, 1);
  grad.row = softmax_side(row_side, "row_side", grad.tile.rows);
  grad.col = softmax_side(col_side, "col_side", grad.tile.cols);
  grad.write = write;
  return grad;
}

}  // namespace sslk
