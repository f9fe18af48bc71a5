// Runs the two-sided softmax kernels over many shapes and options on every instruction set, in buffers of exactly the
// right size, and compares them with plain double arithmetic. Built with sanitizers, and once without any x86 code, by
// test_build.py.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/cpu/softmax.h"

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kScale = 60;

struct Case {
  int64_t rows, cols, gap, ids, positive, excluded;
  bool ignore, uniform;
};

bool close(double got, double expected, double tolerance) {
  return got == expected || std::fabs(got - expected) <= tolerance * (1 + std::fabs(expected));
}

enum class Pair { kNegative, kPositive, kIgnored };

Pair pair_at(const sslk::SoftmaxTile& t, int64_t i, int64_t j) {
  const bool same = t.row_ids && t.row_ids[i] == t.col_ids[j], diagonal = j - i == t.positive;
  if (j - i == t.excluded || (same && t.ignore_same_id && !diagonal)) return Pair::kIgnored;
  return diagonal || same ? Pair::kPositive : Pair::kNegative;
}

// Log-sum-exp, sum and number of positives, sum and number of the pairs that count: of row `i`, or of column `i`.
std::vector<double> statistics(const sslk::SoftmaxTile& t, int64_t i, bool column) {
  std::vector<double> result(5);
  double top = -kInfinity, total = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t k = 0; k < (column ? t.rows : t.cols); ++k) {
      const int64_t row = column ? k : i, col = column ? i : k;
      const double raw = t.raw[row * t.row_stride + col];
      const Pair pair = pair_at(t, row, col);
      if (pair == Pair::kIgnored) continue;
      if (pass == 0) {
        top = std::fmax(top, kScale * raw);
        result[1] += pair == Pair::kPositive ? raw : 0;
        result[2] += pair == Pair::kPositive;
        result[3] += raw;
        result[4] += 1;
      } else {
        total += std::exp(kScale * raw - top);
      }
    }
  }
  result[0] = total > 0 ? top + std::log(total) : -kInfinity;
  return result;
}

bool run(const Case& c, sslk::Isa isa, std::mt19937& random) {
  const int64_t stride = c.cols + c.gap;
  const int64_t size = c.rows ? (c.rows - 1) * stride + c.cols : 0;  // not one element beyond the last row
  std::uniform_real_distribution<float> similarity(-1, 1);
  std::uniform_int_distribution<int64_t> id(0, c.ids > 0 ? c.ids - 1 : 0);
  std::vector<float> raw(size);
  for (float& r : raw) r = similarity(random);
  std::vector<int64_t> row_ids(c.rows), col_ids(c.cols);
  for (int64_t& v : row_ids) v = id(random);
  for (int64_t& v : col_ids) v = id(random);

  sslk::SoftmaxTile tile{};
  tile.raw = raw.data();
  tile.rows = c.rows;
  tile.cols = c.cols;
  tile.row_stride = stride;
  tile.scale = float(kScale);
  tile.row_ids = c.ids ? row_ids.data() : nullptr;
  tile.col_ids = c.ids ? col_ids.data() : nullptr;
  tile.ignore_same_id = c.ignore;
  tile.positive = c.positive;
  tile.excluded = c.excluded;

  const int64_t width = c.uniform ? sslk::kUniformStats : sslk::kStats;
  std::vector<double> stats[2] = {std::vector<double>(c.rows * width), std::vector<double>(c.cols * width)};
  for (auto& side : stats) {
    for (size_t i = 0; i < side.size(); i += width) side[i] = -kInfinity;
  }
  sslk::SoftmaxStats job(tile, stats[0].data(), stats[1].data(), c.uniform);
  job.add_rows(0, job.chunks() / 2, isa);
  job.add_rows(job.chunks() / 2, job.chunks(), isa);
  job.add_columns(0, c.cols < 64 ? c.cols : 64, isa);
  if (c.cols > 64) job.add_columns(64, c.cols, isa);

  std::vector<double> lse[2];
  std::vector<float> top[2], log_sum[2];
  for (int side = 0; side < 2; ++side) {
    for (int64_t i = 0; i < (side ? c.cols : c.rows); ++i) {
      const double* got = stats[side].data() + i * width;
      const auto expected = statistics(tile, i, side == 1);
      if (!close(kScale * got[0] + std::log(got[1]), expected[0], 1e-5)) return false;
      for (int64_t k = 2; k < width; ++k) {
        if (!close(got[k], expected[k - 1], 1e-5)) return false;
      }
      const bool paired = expected[2] > 0;  // without a positive: of no weight
      lse[side].push_back(paired ? expected[0] : kInfinity);
      top[side].push_back(paired ? float(got[0]) : 0.f);
      log_sum[side].push_back(paired ? float(std::log(got[1])) : float(kInfinity));
    }
  }

  const std::vector<float> before = raw, ones[2] = {std::vector<float>(c.rows, 1), std::vector<float>(c.cols, 1)};
  std::vector<float> weight[2];
  for (int side = 0; side < 2; ++side) {
    for (double v : lse[side]) weight[side].push_back(std::isinf(v) ? 0.f : 0.5f);
  }
  std::vector<double> moment(c.rows);
  sslk::SoftmaxGrad grad{};
  grad.tile = tile;
  grad.stats = moment.data();
  const auto side = [&](int i) {
    const float* uniform = c.uniform ? ones[i].data() : nullptr;
    return sslk::SoftmaxGrad::Side{top[i].data(), log_sum[i].data(), weight[i].data(), weight[i].data(), uniform};
  };
  grad.row = side(0);
  grad.col = side(1);
  grad.write = true;
  sslk::softmax_grad(grad, 0, c.rows / 2, isa);
  sslk::softmax_grad(grad, c.rows / 2, c.rows, isa);
  for (int64_t i = 0; i < c.rows; ++i) {
    double expected_moment = 0;
    for (int64_t j = 0; j < stride && i * stride + j < size; ++j) {
      const double r = before[i * stride + j];
      double g = r;
      if (j < c.cols) {
        const Pair pair = pair_at(tile, i, j);
        const double half = pair == Pair::kPositive ? weight[0][i] + weight[1][j] : 0;
        g = weight[0][i] * std::exp(kScale * r - lse[0][i]) + weight[1][j] * std::exp(kScale * r - lse[1][j]);
        g = pair == Pair::kIgnored ? 0 : g - half - (c.uniform ? 2 : 0);
        expected_moment += g * r;
      }
      if (!close(raw[i * stride + j], g, 1e-5)) return false;
    }
    if (!close(moment[i], expected_moment, 1e-4)) return false;
  }
  return true;
}

}  // namespace

int main() {
  int cases = 0;
  for (sslk::Isa isa : sslk::available_isas()) {
    std::mt19937 random(0);
    for (int64_t rows : {0, 1, 5, 70})
      for (int64_t cols : {0, 1, 3, 15, 16, 17, 64, 97})
        for (int64_t gap : {0, 3})
          for (int64_t ids : {0, 1, 4})
            for (int64_t positive : {int64_t(-6), int64_t(0), cols - 1, sslk::kNoDiagonal})
              for (int64_t excluded : {int64_t(0), int64_t(2), sslk::kNoDiagonal})
                for (int mode = 0; mode < 4; ++mode) {
                  const Case c{rows, cols, gap, ids, positive, excluded, mode % 2 == 1, mode / 2 == 1};
                  // A fifth of the long ones, in which any two of the other parameters meet.
                  if (++cases % 5 && rows > 64) continue;
                  if (!run(c, isa, random)) {
                    std::printf("%s: rows %d cols %d gap %d ids %d positive %lld excluded %lld mode %d\n",
                                sslk::isa_name(isa), int(rows), int(cols), int(gap), int(ids),
                                static_cast<long long>(positive), static_cast<long long>(excluded), mode);
                    return 1;
                  }
                }
    std::printf("%s ok\n", sslk::isa_name(isa));
  }
  std::printf("%d cases\n", cases);
}
