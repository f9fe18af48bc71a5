// Runs the search for nearest neighbours on every instruction set, in buffers of exactly the right size, and compares it
// with plain loops. Built with sanitizers, and once without any x86 code, by test_build.py.
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
    std::printf("%s ok\n", sslk::isa_name(isa));
  }
  std::printf("%d cases\n", cases);
}
