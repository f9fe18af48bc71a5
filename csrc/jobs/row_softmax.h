// Arguments of the softmax over rows, checked and as its kernels take them.
#pragma once

#include <vector>

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
  std::optional<Tensor> row_factors;  // of each prefix
  std::optional<Tensor> col_factors;
};

// Factors [prefixes, size] of one prefix, or null when absent.
template <typename Tensor>
const float* factors_of(const std::optional<Tensor>& factors, const char* name, int64_t prefixes, int64_t k,
                        int64_t size) {
  if (!factors) return nullptr;
  check_tile(*factors, name);
  check_size(*factors, name, 0, prefixes);
  check_size(*factors, name, 1, size);
  return static_cast<const float*>(factors->const_data_ptr()) + k * factors->stride(0);
}

template <typename Tensor>
RowTile row_tile(const Tensor& tile, const RowPairs<Tensor>& pairs, int64_t prefixes = 1, int64_t k = 0) {
  check_tile(tile, "tile");
  STD_TORCH_CHECK(pairs.scale >= 0 || pairs.scale != pairs.scale, "scale: expected a number >= 0, got ", pairs.scale);
  STD_TORCH_CHECK(pairs.row_ids.has_value() == pairs.col_ids.has_value(), "row_ids, col_ids: expected both or neither");
  STD_TORCH_CHECK(pairs.row_factors.has_value() == pairs.col_factors.has_value(),
                  "row_factors, col_factors: expected both or neither");
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
  result.row_factor = factors_of(pairs.row_factors, "row_factors", prefixes, k, result.rows);
  result.col_factor = factors_of(pairs.col_factors, "col_factors", prefixes, k, result.cols);
  const bool plain = !result.bias && !result.row_factor && result.same_scale == result.scale &&
                     result.other_scale == result.scale;
  STD_TORCH_CHECK(pairs.logits || plain, "logits: expected true beside a bias, factors or several scales");
  result.logits = pairs.logits;
  return result;
}

// Of the prefixes of the features, which share all but their tiles and factors.
template <typename Tensor>
std::vector<RowTile> row_tiles(const std::vector<Tensor>& tiles, const RowPairs<Tensor>& pairs) {
  STD_TORCH_CHECK(!tiles.empty(), "tiles: expected at least one");
  std::vector<RowTile> result;
  for (const Tensor& tile : tiles) {
    const int64_t k = static_cast<int64_t>(result.size());
    if (k) {
      check_size(tile, "tiles", 0, result[0].rows);
      check_size(tile, "tiles", 1, result[0].cols);
    }
    result.push_back(row_tile(tile, pairs, static_cast<int64_t>(tiles.size()), k));
  }
  return result;
}

// stats [prefixes, rows, width], each prefix contiguous.
template <typename Tensor>
std::vector<RowStats> row_stats_job(const std::vector<Tensor>& tiles, const Tensor& stats,
                                    const RowPairs<Tensor>& pairs) {
  const std::vector<RowTile> made = row_tiles(tiles, pairs);
  check_tensor(stats, "stats", torch::headeronly::ScalarType::Double, 3);
  const int64_t width = stats.size(2) == kAllRowStats ? kAllRowStats : kRowStats;
  check_size(stats, "stats", 0, static_cast<int64_t>(made.size()));
  check_size(stats, "stats", 1, made[0].rows);
  check_size(stats, "stats", 2, width);
  STD_TORCH_CHECK(made[0].rows == 0 || (stats.stride(2) == 1 && (made[0].rows == 1 || stats.stride(1) == width)),
                  "stats: expected rows that are contiguous in memory");
  std::vector<RowStats> job;
  for (const RowTile& tile : made) {
    const int64_t k = static_cast<int64_t>(job.size());
    job.push_back({tile, static_cast<double*>(stats.mutable_data_ptr()) + k * stats.stride(0), width, nullptr});
  }
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

// moments [rows, prefixes] with any strides; col_sums [prefixes, planes, chunks, cols]: two planes are those of G and of
// G s, one is that of G s where there are factors, else of G.
template <typename Tensor>
std::vector<RowGrad> row_grads(const std::vector<Tensor>& tiles, const Tensor& moments, const Tensor& col_sums,
                               const RowPairs<Tensor>& pairs, bool write) {
  using torch::headeronly::ScalarType;
  const std::vector<RowTile> made = row_tiles(tiles, pairs);
  const int64_t prefixes = static_cast<int64_t>(made.size()), rows = made[0].rows, cols = made[0].cols;
  check_tensor(moments, "moments", ScalarType::Double, 2);
  check_size(moments, "moments", 0, rows);
  check_size(moments, "moments", 1, prefixes);
  check_tensor(col_sums, "col_sums", ScalarType::Float, 4);
  check_contiguous(col_sums, "col_sums");
  const int64_t planes = col_sums.size(1), chunks = RowGrad::chunks(rows);
  STD_TORCH_CHECK(planes <= 2, "col_sums: expected at most 2 planes, got ", planes);
  if (planes) {
    check_size(col_sums, "col_sums", 0, prefixes);
    check_size(col_sums, "col_sums", 2, chunks);
    check_size(col_sums, "col_sums", 3, cols);
  }
  std::vector<RowGrad> result;
  for (const RowTile& tile : made) {
    const int64_t k = static_cast<int64_t>(result.size());
    RowGrad job{};
    job.tile = tile;
    job.moments = static_cast<double*>(moments.mutable_data_ptr()) + k * moments.stride(1);
    job.moment_stride = moments.stride(0);
    if (planes) {
      float* sums = static_cast<float*>(col_sums.mutable_data_ptr()) + k * planes * chunks * cols;
      if (planes == 2 || !tile.col_factor) job.col_sums = sums;
      if (planes == 2 || tile.col_factor) job.col_moments = sums + (planes - 1) * chunks * cols;
    }
    job.write = write;
    result.push_back(job);
  }
  return result;
}

// The same with sides [prefixes, 4 or 5, rows] as RowSummary makes them.
template <typename Tensor>
std::vector<RowGrad> row_grad_job(const std::vector<Tensor>& tiles, const Tensor& moments, const Tensor& col_sums,
                                  const RowPairs<Tensor>& pairs, const Tensor& sides, bool write) {
  std::vector<RowGrad> result = row_grads(tiles, moments, col_sums, pairs, write);
  const int64_t rows = result[0].tile.rows;
  check_tensor(sides, "sides", torch::headeronly::ScalarType::Float, 3);
  check_size(sides, "sides", 0, static_cast<int64_t>(result.size()));
  check_size(sides, "sides", 2, rows);
  STD_TORCH_CHECK(sides.size(1) == 4 || sides.size(1) == 5, "sides: expected 4 or 5 vectors, got ", sides.size(1));
  STD_TORCH_CHECK(rows <= 1 || sides.stride(2) == 1, "sides: expected vectors that are contiguous in memory");
  const float* data = static_cast<const float*>(sides.const_data_ptr());
  const int64_t apart = sides.stride(1);
  for (RowGrad& job : result) {
    job.top = data;
    job.log_sum = data + apart;
    job.weight = data + 2 * apart;
    job.target = data + 3 * apart;
    job.all = sides.size(1) == 5 ? data + 4 * apart : nullptr;
    data += sides.stride(0);
  }
  return result;
}

// A visit, and the prefixes that it is of.
struct RowVisitJob {
  std::vector<RowStats> stats;
  std::vector<RowGrad> grads;
  std::vector<double> shares;
  RowVisit visit;

  // Of this job, where it lies now.
  RowVisit here() const {
    RowVisit result = visit;
    result.stats = stats.data();
    result.grads = grads.data();
    result.shares = shares.data();
    result.count = static_cast<int64_t>(grads.size());
    return result;
  }
};

template <typename Tensor>
RowVisitJob row_visit_job(const std::vector<Tensor>& tiles, const Tensor& stats, const Tensor& moments,
                          const Tensor& col_sums, const RowPairs<Tensor>& pairs, const std::optional<Tensor>& weights,
                          double largest, const std::vector<double>& shares, double label_smoothing, bool write) {
  RowVisitJob job{row_stats_job(tiles, stats, pairs), row_grads(tiles, moments, col_sums, pairs, write), shares, {}};
  STD_TORCH_CHECK(shares.size() == tiles.size(), "shares: expected ", tiles.size(), " numbers, got ", shares.size());
  STD_TORCH_CHECK((label_smoothing != 0) == (job.stats[0].width == kAllRowStats),
                  "stats: expected 6 numbers to a row with label smoothing, else 4");
  job.visit.weight = vector_data(weights, "weights", job.grads[0].tile.rows);
  job.visit.largest = largest;
  job.visit.label_smoothing = label_smoothing;
  return job;
}

}  // namespace sslk
