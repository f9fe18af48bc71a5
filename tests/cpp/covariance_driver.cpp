// Runs what VICReg and Barlow Twins do beside their products on every instruction set, in buffers of exactly the right
// size, and compares it with plain double arithmetic. Built with sanitizers, and once without any x86 code, by
// test_build.py.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cpu/covariance.h"

namespace {

using sslk::FeatureType;

bool close(double got, double expected) { return std::fabs(got - expected) <= 1e-4 * (1 + std::fabs(expected)); }

// A matrix of so many rows, as far apart as the stride, of numbers that every type holds exactly.
struct View {
  std::unique_ptr<char[]> data;
  std::vector<double> values;

  View(int64_t rows, int64_t width, int64_t stride, FeatureType type, std::mt19937& random) : values(rows * width) {
    const int64_t item = type == FeatureType::kFloat32 ? 4 : 2;
    data.reset(new char[((rows - 1) * stride + width) * item]);
    for (int64_t i = 0; i < rows * width; ++i) {
      const float value = float(int(random() % 65) - 16) / 16;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      uint16_t half = uint16_t(bits >> 16);
      if (type == FeatureType::kFloat16) {
        half = value != 0 ? (half & 0x8000) | ((bits & 0x7fffffff) - (112u << 23)) >> 13 : 0;
      }
      const void* from = type == FeatureType::kFloat32 ? static_cast<void*>(&bits) : &half;
      std::memcpy(data.get() + (i / width * stride + i % width) * item, from, item);
      values[i] = value;
    }
  }
};

bool run(int64_t rows, int64_t width, int64_t gap, FeatureType type, bool standardise, sslk::Isa isa,
         std::mt19937& random) {
  const View z[] = {{rows, width, width + gap, type, random}, {rows, width, width, type, random}};
  const int64_t size = rows * width;
  std::unique_ptr<float[]> out[2];
  std::unique_ptr<float[]> columns(new float[3 * width]), gradient(new float[size]), weights(new float[width]);
  sslk::Views views{};
  views.type = type;
  views.rows = rows;
  views.width = width;
  views.standardise = standardise;
  views.eps = 0.125;
  views.columns = columns.get();
  for (int view = 0; view < 2; ++view) {
    out[view].reset(new float[size]);
    views.z[view] = z[view].data.get();
    views.stride[view] = view == 0 ? width + gap : width;
    views.out[view] = out[view].get();
  }
  sslk::center_views(views, 0, width / 3, isa);
  sslk::center_views(views, width / 3, width, isa);

  std::vector<double> expected[] = {z[0].values, z[1].values};
  for (int64_t col = 0; col < width; ++col) {
    double sums[2] = {}, differences = 0, products = 0;
    for (int view = 0; view < 2; ++view) {
      double mean = 0;
      for (int64_t row = 0; row < rows; ++row) mean += expected[view][row * width + col] / double(rows);
      for (int64_t i = col; i < size; i += width) {
        expected[view][i] -= mean;
        sums[view] += expected[view][i] * expected[view][i];
      }
      if (!standardise) continue;
      sums[view] = std::sqrt(sums[view] / double(rows) + views.eps);
      for (int64_t i = col; i < size; i += width) expected[view][i] /= sums[view];
    }
    for (int64_t i = col; i < size; i += width) {
      differences += (z[0].values[i] - z[1].values[i]) * (z[0].values[i] - z[1].values[i]);
      products += expected[0][i] * expected[1][i];
    }
    if (!close(columns[col], sums[0]) || !close(columns[width + col], sums[1])) return false;
    if (!close(columns[2 * width + col], standardise ? products : differences)) return false;
  }

  double product = 0, expected_product = 0;
  std::unique_ptr<double[]> sums(new double[rows]);
  sslk::row_products({out[0].get(), out[1].get(), width, width, width, sums.get()}, 0, rows / 2, isa);
  sslk::row_products({out[0].get(), out[1].get(), width, width, width, sums.get()}, rows / 2, rows, isa);
  for (int64_t row = 0; row < rows; ++row) product += sums[row];
  for (int64_t i = 0; i < size; ++i) expected_product += expected[0][i] * expected[1][i];
  if (!close(product, expected_product)) return false;

  for (int view = 0; view < 2; ++view) {
    for (int64_t i = 0; i < size; ++i) {
      gradient[i] = float(i % 7) - 3;
      if (!close(out[view][i], expected[view][i])) return false;
    }
    for (int64_t col = 0; col < width; ++col) weights[col] = float(col % 5) / 4;
    const sslk::ViewGradient job{gradient.get(), 0.5f, weights.get(), 0.75f};
    const auto half = [&](auto kernel, int64_t end) {
      kernel(views, view, job, 0, end / 2, isa);
      kernel(views, view, job, end / 2, end, isa);
    };
    standardise ? half(sslk::barlow_twins_gradient, width) : half(sslk::vicreg_gradient, rows);
    for (int64_t col = 0; col < width; ++col) {
      double along = 0;
      const auto g = [&](int64_t i) {
        const double own = 0.5 * (double(i % 7) - 3);
        if (standardise) return own + weights[col] * expected[1 - view][i];
        return own + weights[col] * expected[view][i] + 0.75 * (z[0].values[i] - z[1].values[i]);
      };
      if (standardise) {
        for (int64_t i = col; i < size; i += width) along += g(i) * expected[view][i] / double(rows);
      }
      const double sigma = standardise ? columns[view * width + col] : 1;
      for (int64_t i = col; i < size; i += width) {
        if (!close(gradient[i], (g(i) - along * expected[view][i]) / sigma)) return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  int cases = 0;
  for (sslk::Isa isa : sslk::available_isas()) {
    std::mt19937 random(0);
    for (int64_t rows : {2, 3, 16, 17, 50})
      for (int64_t width : {1, 3, 15, 16, 17, 64, 131, 256, 257, 800})
        for (FeatureType type : {FeatureType::kFloat32, FeatureType::kBFloat16, FeatureType::kFloat16})
          for (bool standardise : {false, true}) {
            ++cases;
            if (!run(rows, width, rows % 2 ? 3 : 0, type, standardise, isa, random)) {
              std::printf("%s: %d rows, width %d, type %d, standardise %d\n", sslk::isa_name(isa), int(rows),
                          int(width), int(type), standardise);
              return 1;
            }
          }
    std::printf("%s ok\n", sslk::isa_name(isa));
  }
  std::printf("%d cases\n", cases);
}
