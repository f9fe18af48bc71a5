// Runs the search for nearest neighbours, and what KoLeo makes of them, on every instruction set, in buffers of exactly
// the right size, and compares it with plain loops. Built with sanitizers, and once without any x86 code, by
// test_build.py.
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cpu/koleo.h"

namespace {

struct Found {
  std::unique_ptr<float[]> best;
  std::unique_ptr<int64_t[]> neighbor;

  explicit Found(int64_t size) : best(new float[size]), neighbor(new int64_t[size]) {
    for (int64_t k = 0; k < size; ++k) best[k] = -std::numeric_limits<float>::infinity(), neighbor[k] = -1;
  }

  sslk::KoleoSide side(int64_t first) { return {best.get(), neighbor.get(), first}; }

  void meet(int64_t k, float value, int64_t whose) {
    if (value > best[k]) best[k] = value, neighbor[k] = whose;
  }

  bool equals(const Found& other, int64_t size) const {
    for (int64_t k = 0; k < size; ++k) {
      if (best[k] != other.best[k] || neighbor[k] != other.neighbor[k]) return false;
    }
    return true;
  }
};

// Two tiles one after the other, either side in two ranges; few values, so that many are equal.
bool run(int64_t rows, int64_t cols, int64_t gap, int values, sslk::Isa isa, std::mt19937& random) {
  const int64_t stride = cols + gap, first_row = 3;
  const int64_t size = rows ? (rows - 1) * stride + cols : 0;  // not one element beyond the last row
  std::unique_ptr<float[]> tile(new float[size]);
  Found row(rows), col(cols), row_expected(rows), col_expected(cols);
  for (int64_t first_col : {int64_t(100), int64_t(1) << 40}) {
    for (int64_t k = 0; k < size; ++k) tile[k] = float(int(random() % (2 * values)) - values);
    const sslk::KoleoPanel panel{tile.get(), rows, cols, stride, row.side(first_row), col.side(first_col)};
    sslk::koleo_rows(panel, 0, rows / 2, isa);
    sslk::koleo_rows(panel, rows / 2, rows, isa);
    sslk::koleo_columns(panel, 0, cols / 3, isa);
    sslk::koleo_columns(panel, cols / 3, cols, isa);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        row_expected.meet(i, tile[i * stride + j], first_col + j);
        col_expected.meet(j, tile[i * stride + j], first_row + i);
      }
    }
  }
  return row.equals(row_expected, rows) && col.equals(col_expected, cols);
}

// A square tile whose rows are its columns: nobody is their own neighbour.
bool run_diagonal(int64_t size, sslk::Isa isa, std::mt19937& random) {
  std::unique_ptr<float[]> tile(new float[size * size]);
  Found row(size), expected(size);
  for (int64_t k = 0; k < size * size; ++k) tile[k] = float(int(random() % 20));
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < size; ++j) {
      if (i != j) expected.meet(i, tile[i * size + j], 3 + j);
    }
  }
  sslk::koleo_rows({tile.get(), size, size, size, row.side(3), row.side(3)}, 0, size, isa);
  return row.equals(expected, size);
}

bool close(double got, double expected) { return std::fabs(got - expected) <= 1e-4 * (1 + std::fabs(expected)); }

// Neighbours at random, of which some are shared; rows in two ranges. One row is 0, and one is shorter than eps.
bool run_rows(int64_t size, int64_t width, sslk::Isa isa, std::mt19937& random) {
  const float eps = 1e-2f;
  std::normal_distribution<float> normal;
  std::unique_ptr<float[]> x(new float[size * width]), unit(new float[size * width]), gradient(new float[size * width]);
  std::unique_ptr<float[]> norm(new float[size]), distance(new float[size]), upstream(new float[size]);
  std::unique_ptr<int64_t[]> neighbor(new int64_t[size]);
  for (int64_t k = 0; k < size * width; ++k) x[k] = normal(random) * float(k / width == 0 ? 0 : k / width == 1 ? 1e-5 : 2);
  for (int64_t i = 0; i < size; ++i) neighbor[i] = int64_t(random() % (size / 2 + 1)), upstream[i] = normal(random);

  const sslk::KoleoRows rows{sslk::FeatureType::kFloat32, x.get(), size, width, width, eps, norm.get(), neighbor.get(),
                             distance.get()};
  sslk::koleo_unit_rows(rows, unit.get(), 0, size / 2, isa);
  sslk::koleo_unit_rows(rows, unit.get(), size / 2, size, isa);
  sslk::koleo_distances(rows, 0, size / 3, isa);
  sslk::koleo_distances(rows, size / 3, size, isa);
  const sslk::KoleoGradient job(rows, upstream.get(), 1, 0.5, gradient.get());
  job.write_rows(0, size / 3, isa);
  job.write_rows(size / 3, size, isa);

  std::vector<double> u(size * width), du(size * width), divisor(size);
  for (int64_t i = 0; i < size; ++i) {
    double squares = 0;
    for (int64_t k = 0; k < width; ++k) squares += double(x[i * width + k]) * x[i * width + k];
    divisor[i] = std::fmax(std::sqrt(squares), eps);
    if (!close(norm[i], std::sqrt(squares))) return false;
    for (int64_t k = i * width; k < (i + 1) * width; ++k) {
      u[k] = x[k] / divisor[i];
      if (!close(unit[k], u[k])) return false;
    }
  }
  for (int64_t i = 0; i < size; ++i) {
    const auto d = [&](int64_t k) { return u[i * width + k] - u[neighbor[i] * width + k] + eps; };
    double squares = 0;
    for (int64_t k = 0; k < width; ++k) squares += d(k) * d(k);
    const double r = std::sqrt(squares);
    if (!close(distance[i], r)) return false;
    for (int64_t k = 0; k < width; ++k) {
      const double push = 0.5 * upstream[i] * d(k) / (r * (r + eps));
      du[i * width + k] -= push;
      du[neighbor[i] * width + k] += push;
    }
  }
  for (int64_t i = 0; i < size; ++i) {
    double radial = 0;
    for (int64_t k = 0; k < width && norm[i] > eps; ++k) radial += du[i * width + k] * u[i * width + k];
    for (int64_t k = i * width; k < (i + 1) * width; ++k) {
      if (!close(gradient[k] * divisor[i], du[k] - radial * u[k])) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  int cases = 0;
  for (sslk::Isa isa : sslk::available_isas()) {
    std::mt19937 random(0);
    for (int64_t rows : {0, 1, 2, 7, 130})
      for (int64_t cols : {0, 1, 3, 15, 16, 17, 63, 64, 65, 131, 1100})
        for (int64_t gap : {0, 3})
          for (int values : {1, 1000}) {
            ++cases;
            if (!run(rows, cols, gap, values, isa, random)) {
              std::printf("%s: %d rows, %d cols, gap %d, values %d\n", sslk::isa_name(isa), int(rows), int(cols),
                          int(gap), values);
              return 1;
            }
          }
    for (int64_t size : {2, 3, 9})
      for (int64_t width : {0, 1, 15, 16, 17, 40, 1100}) {
        cases += 2;
        if (!run_diagonal(size * 7, isa, random) || !run_rows(size, width, isa, random)) {
          std::printf("%s: %d rows of %d features\n", sslk::isa_name(isa), int(size), int(width));
          return 1;
        }
      }
    std::printf("%s ok\n", sslk::isa_name(isa));
  }
  std::printf("%d cases\n", cases);
}
