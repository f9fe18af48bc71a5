// Arguments of the softmax over rows, checked and as its kernels take them.
#pragma once

#include "../checks.h"
#include "../cpu/row_softmax.h"

namespace sslk {

// What there is to know of the pairs of a tile beside their similarities, in the order of the ops' arguments.
template <typename Tensor>
struct RowPairs {
  Tensor target;
  std::optional<Tensor> row_ids;
  std::optional<Tensor> col_ids;
  int64_t same_id;
  bool guided;
  bool logits;
  double scale;
  double same_scale;
  double other_scale;
  std::optional<Tensor> bias;
  std::optional<Tensor> row_factor;
  std::optional<Tensor> col_factor;
};

template <typename Tensor>
RowTile row_tile(const Tensor& tile, const RowPairs<Tensor>& pairs) {
  check_tile(tile, "tile");
  STD_TORCH_CHECK(pairs.scale >= 0 || pairs.scale != pairs.scale, "scale: expected a number >= 0, got ", pairs.scale);
  STD_TORCH_CHECK(pairs.row_ids.has_value() == pairs.col_ids.has_value(), "row_ids, col_ids: expected both or neither");
  STD_TORCH_CHECK(pairs.row_factor.has_value() == pairs.col_factor.has_value(),
                  "row_factor, col_factor: expected both or neither");
  STD_TORCH_CHECK(pairs.same_id >= 0 && pairs.same_id <= 2, "same_id: expected 0, 1 or 2, got ", pairs.same_id);
  RowTile result{};
  result.raw = static_cast<float*>(tile.mutable_data_ptr());
  result.rows = tile.size(0);
  result.cols = tile.size(1);
  result.row_stride = tile.stride(0);
  result.target = check_ids(std::optional<Tensor>(pairs.target), "target", result.rows);
  result.row_ids = check_ids(pairs.row_ids, "row_ids", result.rows);
  result.col_ids = check_ids(pairs.col_ids, "col_ids", result.cols);
  result.same_id = static_cast<SameId>(pairs.same_id);
  result.guided = pairs.guided;
  result.scale = static_cast<float>(pairs.scale);
  result.same_scale = static_cast<float>(pairs.same_scale);
  result.other_scale = static_cast<float>(pairs.other_scale);
  result.bias = vector_data(pairs.bias, "bias", result.cols);
  result.row_factor = vector_data(pairs.row_factor, "row_factor", result.rows);
  result.col_factor = vector_data(pairs.col_factor, "col_factor", result.cols);
  const bool plain = !result.bias && !result.row_factor && result.same_scale == result.scale &&
                     result.other_scale == result.scale;
  STD_TORCH_CHECK(pairs.logits || plain, "logits: expected true beside a bias, factors or several scales");
  result.logits = pairs.logits;
  return result;
}

template <typename Tensor>
RowStats row_stats_job(const Tensor& tile, const Tensor& stats, const RowPairs<Tensor>& pairs) {
  RowStats job{};
  job.tile = row_tile(tile, pairs);
  job.width = stats.dim() == 2 && stats.size(1) == kAllRowStats ? kAllRowStats : kRowStats;
  job.stats = stats_data(stats, "stats", job.tile.rows, job.width);
  return job;
}

template <typename Tensor>
RowGuide row_guide_job(const Tensor& tile, const Tensor& scores, const Tensor& threshold,
                       const RowPairs<Tensor>& pairs) {
  RowGuide job{};
  job.tile = row_tile(tile, pairs);
  check_tile(scores, "scores");
  check_size(scores, "scores", 0, job.tile.rows);
  check_size(scores, "scores", 1, job.tile.cols);
  job.scores = static_cast<const float*>(scores.const_data_ptr());
  job.score_stride = scores.stride(0);
  job.threshold = vector_data(std::optional<Tensor>(threshold), "threshold", job.tile.rows);
  return job;
}

// moments [rows] with any stride; side as RowSummary makes it; col_sums [2, chunks, cols], of which the second half is
// that of moments, or [1, chunks, cols] or [0, chunks, cols].
template <typename Tensor>
RowGrad row_grad_job(const Tensor& tile, const Tensor& moments, const Tensor& col_sums, const RowPairs<Tensor>& pairs,
                     const Tensor& side, bool write, const std::optional<Tensor>& add) {
  using torch::headeronly::ScalarType;
  RowGrad job{};
  job.tile = row_tile(tile, pairs);
  const int64_t rows = job.tile.rows, cols = job.tile.cols;
  check_tensor(moments, "moments", ScalarType::Double, 1);
  check_size(moments, "moments", 0, rows);
  job.moments = static_cast<double*>(moments.mutable_data_ptr());
  job.moment_stride = moments.stride(0);
  check_tensor(side, "side", ScalarType::Float, 2);
  check_size(side, "side", 1, rows);
  STD_TORCH_CHECK(side.size(0) == 4 || side.size(0) == 5, "side: expected 4 or 5 vectors, got ", side.size(0));
  STD_TORCH_CHECK(rows <= 1 || side.stride(1) == 1, "side: expected vectors that are contiguous in memory");
  const float* data = static_cast<const float*>(side.const_data_ptr());
  const int64_t apart = side.stride(0);
  job.top = data;
  job.log_sum = data + apart;
  job.weight = data + 2 * apart;
  job.target = data + 3 * apart;
  job.all = side.size(0) == 5 ? data + 4 * apart : nullptr;
  check_tensor(col_sums, "col_sums", ScalarType::Float, 3);
  check_contiguous(col_sums, "col_sums");
  STD_TORCH_CHECK(col_sums.size(0) <= 2, "col_sums: expected at most 2 planes, got ", col_sums.size(0));
  if (col_sums.size(0)) {
    check_size(col_sums, "col_sums", 1, job.chunks());
    check_size(col_sums, "col_sums", 2, cols);
    job.col_sums = static_cast<float*>(col_sums.mutable_data_ptr());
    job.col_moments = col_sums.size(0) == 2 ? job.col_sums + job.chunks() * cols : nullptr;
  }
  job.write = write;
  if (add) {
    check_tile(*add, "add");
    check_size(*add, "add", 0, rows);
    check_size(*add, "add", 1, cols);
    job.add = static_cast<const float*>(add->const_data_ptr());
    job.add_stride = add->stride(0);
  }
  return job;
}

}  // namespace sslk
