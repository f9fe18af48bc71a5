// Runs the kernels of the softmax over rows over many shapes and options on every instruction set, in buffers of exactly
// the right size, and compares them with plain double arithmetic. Built with sanitizers, and once without any x86 code,
// by test_build.py.
#include <cfenv>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/cpu/row_softmax.h"

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Case {
  int64_t rows, cols, gap, ids;
  sslk::SameId same_id;
  bool all, bias, factors, guided;
};

bool close(double got, double expected, double tolerance) {
  return got == expected || std::fabs(got - expected) <= tolerance * (1 + std::fabs(expected));
}

struct Pair {
  bool positive, ignored;
  double s, v;
};

Pair pair_at(const sslk::RowTile& t, int64_t i, int64_t j) {
  const bool target = t.target[i] == j, same = t.row_ids && t.row_ids[i] == t.col_ids[j];
  const double raw = t.raw[i * t.row_stride + j];
  Pair p{};
  p.ignored = (same && t.same_id == sslk::SameId::kIgnored && !target) || (t.guided && raw < sslk::kLeastSimilarity) ||
              (t.bias && std::isinf(t.bias[j]));
  p.positive = (target || (same && t.same_id == sslk::SameId::kPositive)) && !p.ignored;
  p.s = t.row_factor ? raw * t.row_factor[i] * t.col_factor[j] : raw;
  p.v = p.s;
  if (t.logits) p.v = p.s * (p.positive ? t.scale : same ? t.same_scale : t.other_scale) + (t.bias ? t.bias[j] : 0);
  return p;
}

bool run(const Case& c, sslk::Isa isa, std::mt19937& random) {
  const int64_t stride = c.cols + c.gap;
  const int64_t size = c.rows ? (c.rows - 1) * stride + c.cols : 0;  // not one element beyond the last row
  std::uniform_real_distribution<float> similarity(-1, 1), factor(0.5, 2);
  std::uniform_int_distribution<int64_t> id(0, c.ids > 0 ? c.ids - 1 : 0), target(-2, c.cols + 1);
  std::vector<float> raw(size), bias(c.cols), row_factor(c.rows), col_factor(c.cols), scores(c.rows * c.cols);
  std::vector<float> threshold(c.rows, 0.5f);
  std::vector<int64_t> targets(c.rows), row_ids(c.rows), col_ids(c.cols);
  for (float& r : raw) r = similarity(random);
  for (float& b : bias) b = similarity(random) < -0.8f ? -float(kInfinity) : similarity(random);
  for (float& f : row_factor) f = factor(random);
  for (float& f : col_factor) f = factor(random);
  for (float& s : scores) s = similarity(random);
  for (int64_t& v : targets) v = target(random);
  for (int64_t& v : row_ids) v = id(random);
  for (int64_t& v : col_ids) v = id(random);

  sslk::RowTile tile{};
  tile.raw = raw.data();
  tile.rows = c.rows;
  tile.cols = c.cols;
  tile.row_stride = stride;
  tile.target = targets.data();
  tile.row_ids = c.ids ? row_ids.data() : nullptr;
  tile.col_ids = c.ids ? col_ids.data() : nullptr;
  tile.same_id = c.same_id;
  tile.scale = tile.same_scale = tile.other_scale = 30;
  if (c.bias) tile.bias = bias.data();
  if (c.factors) {
    tile.row_factor = row_factor.data();
    tile.col_factor = col_factor.data();
    tile.same_scale = 33;
  }
  tile.logits = c.bias || c.factors;
  if (c.guided) {
    sslk::row_softmax_guide({tile, scores.data(), c.cols, threshold.data()}, 0, c.rows, isa);
    tile.guided = true;
  }

  const int64_t width = c.all ? sslk::kAllRowStats : sslk::kRowStats;
  std::vector<double> stats(c.rows * width);
  for (size_t i = 0; i < stats.size(); i += width) stats[i] = -kInfinity;
  const sslk::RowStats of_rows{tile, stats.data(), width, nullptr};
  sslk::row_softmax_stats(&of_rows, 1, 0, c.rows / 2, isa);
  sslk::row_softmax_stats(&of_rows, 1, c.rows / 2, c.rows, isa);

  std::vector<double> moments(c.rows);
  float largest = 0, loss = 0;
  std::vector<float> side(c.rows * (c.all ? 5 : 4));
  sslk::RowSummary summary{};
  summary.stats = stats.data();
  summary.rows = c.rows;
  summary.width = width;
  summary.unit = tile.unit();
  summary.label_smoothing = c.all ? 0.25 : 0;
  summary.loss = &loss;
  summary.largest = &largest;
  summary.side = side.data();
  sslk::row_softmax_summary(summary);

  sslk::RowGrad grad{};
  grad.tile = tile;
  grad.moments = moments.data();
  grad.moment_stride = 1;
  grad.top = side.data();
  grad.log_sum = grad.top + c.rows;
  grad.weight = grad.log_sum + c.rows;
  grad.target = grad.weight + c.rows;
  grad.all = c.all ? grad.target + c.rows : nullptr;
  const int64_t chunks = sslk::RowGrad::chunks(c.rows);
  std::vector<float> col_sums(chunks * c.cols), col_moments(chunks * c.cols);
  grad.col_sums = col_sums.data();
  grad.col_moments = col_moments.data();
  grad.write = true;
  const std::vector<float> before = raw;
  std::vector<Pair> pairs;
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.cols; ++j) pairs.push_back(pair_at(tile, i, j));
  }
  // Behind a shorter prefix without similarities, the whole is what it is alone.
  std::vector<float> shorter(size);
  std::vector<double> both_moments(2 * c.rows), both_stats(2 * stats.size());
  sslk::RowGrad both[2] = {grad, grad};
  both[0].tile.raw = shorter.data();
  std::vector<float> longer = raw;
  both[1].tile.raw = longer.data();
  sslk::RowStats both_rows[2];
  for (int k = 0; k < 2; ++k) {
    for (size_t i = 0; i < stats.size(); i += width) both_stats[k * stats.size() + i] = -kInfinity;
    both_rows[k] = {both[k].tile, both_stats.data() + k * stats.size(), width, nullptr};
    both[k].moments = both_moments.data() + k * c.rows;
    both[k].col_sums = both[k].col_moments = nullptr;
  }
  sslk::row_softmax_stats(both_rows, 2, 0, c.rows, isa);
  if (longer != raw) return false;
  for (size_t i = 0; i < stats.size(); ++i) {
    if (!close(both_stats[stats.size() + i], stats[i], 0)) return false;
  }
  sslk::row_softmax_grad(both, 2, true, 0, both[0].steps(), isa);

  // A visit makes both.
  std::vector<float> visited = raw, visited_sums(col_sums.size());
  std::vector<double> visited_stats(stats.size()), visited_moments(c.rows);
  for (size_t i = 0; i < stats.size(); i += width) visited_stats[i] = -kInfinity;
  sslk::RowGrad visited_grad = grad;
  visited_grad.tile.raw = visited.data();
  visited_grad.moments = visited_moments.data();
  visited_grad.col_sums = nullptr;
  visited_grad.col_moments = c.factors ? visited_sums.data() : nullptr;
  const sslk::RowStats visited_rows{visited_grad.tile, visited_stats.data(), width, nullptr};
  const double share = 1;
  const sslk::RowVisit visit{&visited_rows, &visited_grad, 1, nullptr, 1, &share, summary.label_smoothing};
  const int64_t steps = visited_grad.steps();
  sslk::row_softmax_visit(visit, 0, steps / 2, isa);
  sslk::row_softmax_visit(visit, steps / 2, steps, isa);
  if (visited_stats != stats) return false;

  sslk::row_softmax_grad(&grad, 1, true, 0, grad.steps() / 2, isa);
  sslk::row_softmax_grad(&grad, 1, true, grad.steps() / 2, grad.steps(), isa);
  for (int64_t i = 0; i < size; ++i) {
    if (!close(visited[i], raw[i], 2e-5)) return false;
  }
  for (int64_t i = 0; i < c.rows; ++i) {
    if (!close(visited_moments[i], moments[i], 1e-4)) return false;
  }
  for (size_t i = 0; c.factors && i < col_moments.size(); ++i) {
    if (!close(visited_sums[i], col_moments[i], 1e-4)) return false;
  }
  for (int64_t i = 0; i < size; ++i) {
    if (longer[i] != raw[i]) return false;
  }

  double expected_loss = 0;
  std::vector<double> by_col(c.cols), by_col_moment(c.cols);
  for (int64_t i = 0; i < c.rows; ++i) {
    double top = -kInfinity, total = 0, positives = 0, count = 0, all = 0, all_count = 0, moment = 0;
    const Pair* row = pairs.data() + i * c.cols;
    for (int64_t j = 0; j < c.cols; ++j) {
      if (!row[j].ignored) top = std::fmax(top, row[j].v);
    }
    for (int64_t j = 0; j < c.cols; ++j) {
      if (row[j].ignored) continue;
      total += std::exp(tile.unit() * (row[j].v - top));
      positives += row[j].positive ? row[j].v : 0;
      count += row[j].positive;
      all += row[j].v;
      all_count += 1;
    }
    const double lse = count ? tile.unit() * top + std::log(total) : kInfinity, smoothing = summary.label_smoothing;
    if (count) {
      expected_loss += lse - tile.unit() * (1 - smoothing) * positives / count;
      if (smoothing) expected_loss -= tile.unit() * smoothing * all / all_count;
    }
    for (int64_t j = 0; j < stride && i * stride + j < size; ++j) {
      double g = before[i * stride + j];
      if (j < c.cols) {
        g = 0;
        if (count && !row[j].ignored) {
          g = std::exp(tile.unit() * row[j].v - lse) - (row[j].positive ? (1 - smoothing) / count : 0);
          if (smoothing) g -= smoothing / all_count;
        }
        moment += g * row[j].s;
        by_col[j] += g;
        by_col_moment[j] += g * row[j].s;
        if (c.factors) g *= double(row_factor[i]) * col_factor[j];
      }
      if (!close(raw[i * stride + j], g, 2e-5)) return false;
    }
    if (!close(moments[i], moment, 1e-4)) return false;
  }
  for (int64_t j = 0; j < c.cols; ++j) {
    double sum = 0, moment = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      sum += col_sums[chunk * c.cols + j];
      moment += col_moments[chunk * c.cols + j];
    }
    if (!close(sum, by_col[j], 1e-4) || !close(moment, by_col_moment[j], 1e-4)) return false;
  }
  return close(loss, expected_loss, 1e-4) && largest == 1;
}

// Whether a visit gets by without subnormal numbers, which are slow, where most probabilities are as good as 0.
bool is_fast_at_large_scales(sslk::Isa isa) {
  constexpr int64_t rows = 2, cols = 67;
  std::vector<float> raw(rows * cols, -0.5f);
  const std::vector<int64_t> target(rows, 40);
  for (int64_t i = 0; i < rows; ++i) raw[i * cols + 40] = raw[i * cols + 41] = 0.5f;
  sslk::RowTile tile{};
  tile.raw = raw.data();
  tile.rows = rows;
  tile.cols = tile.row_stride = cols;
  tile.target = target.data();
  tile.scale = tile.same_scale = tile.other_scale = 200;
  double stats[rows * sslk::kRowStats] = {-kInfinity, 0, 0, 0, -kInfinity}, moments[rows] = {}, share = 1;
  sslk::RowGrad grad{};
  grad.tile = tile;
  grad.moments = moments;
  grad.moment_stride = 1;
  grad.write = true;
  const sslk::RowStats of_rows{tile, stats, sslk::kRowStats, nullptr};
  std::feclearexcept(FE_UNDERFLOW);
  sslk::row_softmax_visit({&of_rows, &grad, 1, nullptr, 1, &share, 0}, 0, rows, isa);
  return !std::fetestexcept(FE_UNDERFLOW) && raw[0] == 0 && raw[40] == -0.5f && raw[41] == 0.5f;
}

}  // namespace

int main() {
  int cases = 0;
  for (sslk::Isa isa : sslk::available_isas()) {
    std::mt19937 random(0);
    for (int64_t rows : {0, 1, 5, 70, 130})
      for (int64_t cols : {0, 1, 3, 15, 16, 17, 64, 97})
        for (int64_t gap : {0, 3})
          for (int64_t ids : {0, 1, 4})
            for (int64_t same_id : {0, 1, 2})
              for (int mode = 0; mode < 16; ++mode) {
                const bool all = mode & 1, bias = mode & 2, factors = mode & 4, guided = mode & 8;
                const Case c{rows, cols, gap, ids, sslk::SameId(same_id), all, bias, factors, guided};
                // Of the long ones an eleventh, in which any two of the other parameters meet.
                if (++cases % 11 && rows > 64) continue;
                if (!run(c, isa, random)) {
                  std::printf("%s: rows %d cols %d gap %d ids %d same_id %d mode %d\n", sslk::isa_name(isa), int(rows),
                              int(cols), int(gap), int(ids), int(same_id), mode);
                  return 1;
                }
              }
    if (!is_fast_at_large_scales(isa)) {
      std::printf("%s: subnormal numbers\n", sslk::isa_name(isa));
      return 1;
    }
    std::printf("%s ok\n", sslk::isa_name(isa));
  }
  std::printf("%d cases\n", cases);
}
