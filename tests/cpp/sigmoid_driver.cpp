// Runs the tile kernel over many shapes and options on every instruction set, in buffers of exactly the right size, and
// compares it with plain double arithmetic. Built with sanitizers, and once without any x86 code, by test_build.py.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>

#include "../../csrc/cpu/sigmoid.h"

namespace {

struct Case {
  int64_t rows, cols, gap, ids, diagonal;
  bool ignore, grad, write;
};

bool close(double got, double expected, double tolerance) {
  return std::fabs(got - expected) <= tolerance * (1 + std::fabs(expected));
}

bool run(const Case& c, sslk::Isa isa, std::mt19937& random) {
  const int64_t stride = c.cols + c.gap;
  const int64_t size = c.rows ? (c.rows - 1) * stride + c.cols : 0;  // not one element beyond the last row
  std::normal_distribution<float> normal;
  std::unique_ptr<float[]> tile(new float[size]), before(new float[size]);
  for (int64_t i = 0; i < size; ++i) tile[i] = before[i] = normal(random);
  const int64_t width = c.grad ? 3 : 1;
  std::unique_ptr<double[]> stats(new double[c.rows * width]());
  std::unique_ptr<int64_t[]> row_ids(new int64_t[c.rows]), col_ids(new int64_t[c.cols]);
  std::uniform_int_distribution<int64_t> id(0, c.ids > 0 ? c.ids - 1 : 0);
  for (int64_t i = 0; i < c.rows; ++i) row_ids[i] = id(random);
  for (int64_t j = 0; j < c.cols; ++j) col_ids[j] = id(random);

  sslk::SigmoidPanel panel{};
  panel.tile = tile.get();
  panel.rows = c.rows;
  panel.cols = c.cols;
  panel.row_stride = stride;
  panel.stats = stats.get();
  panel.stats_width = width;
  panel.scale = 7.5f;
  panel.bias = -2.5f;
  panel.row_ids = c.ids ? row_ids.get() : nullptr;
  panel.col_ids = c.ids ? col_ids.get() : nullptr;
  panel.ignore_same_id = c.ignore;
  panel.diagonal = c.diagonal;
  panel.write_grad = c.write;
  sslk::sigmoid_panel(panel, 0, c.rows / 2, isa);
  sslk::sigmoid_panel(panel, c.rows / 2, c.rows, isa);

  for (int64_t i = 0; i < c.rows; ++i) {
    double sums[3] = {};
    for (int64_t j = 0; j < stride && i * stride + j < size; ++j) {
      const double raw = before[i * stride + j], got = tile[i * stride + j];
      double grad = raw;
      if (j < c.cols) {
        const bool same = c.ids && row_ids[i] == col_ids[j];
        const bool positive = j == i + c.diagonal || (same && !c.ignore);
        const double z = (positive ? -1 : 1) * (7.5 * raw - 2.5);
        const bool counted = positive || !same;
        const double g = counted ? (positive ? -1 : 1) / (1 + std::exp(-z)) : 0;
        sums[0] += counted ? std::fmax(z, 0) + std::log1p(std::exp(-std::fabs(z))) : 0;
        sums[1] += g * raw;
        sums[2] += g;
        if (c.write) grad = g;
      }
      if (!close(got, grad, 2e-6)) return false;
    }
    for (int64_t k = 0; k < width; ++k) {
      if (!close(stats[i * width + k], sums[k], 1e-5)) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  int cases = 0;
  for (sslk::Isa isa : sslk::available_isas()) {
    std::mt19937 random(0);
    for (int64_t rows : {0, 1, 5})
      for (int64_t cols : {0, 1, 3, 4, 15, 16, 17, 31, 64, 97})
        for (int64_t gap : {0, 3})
          for (int64_t ids : {0, 1, 4})
            for (int64_t diagonal : {int64_t(-6), int64_t(-2), int64_t(0), cols - 1, cols + 1, int64_t(1) << 62})
              for (int mode = 0; mode < 6; ++mode) {
                const Case c{rows, cols, gap, ids, diagonal, mode % 2 == 1, mode / 2 > 0, mode / 2 == 2};
                ++cases;
                if (!run(c, isa, random)) {
                  std::printf("%s: rows %d cols %d gap %d ids %d diagonal %lld mode %d\n", sslk::isa_name(isa),
                              int(rows), int(cols), int(gap), int(ids), static_cast<long long>(diagonal), mode);
                  return 1;
                }
              }
    std::printf("%s ok\n", sslk::isa_name(isa));
  }
  std::printf("%d cases\n", cases);
}
