// Runs the kernels of the softmax over keys and of the queue on every instruction set, in buffers of exactly the right
// size, and compares them with plain double arithmetic. Built with sanitizers, and once without any x86 code, by
// test_build.py.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cpu/key_softmax.h"
#include "../../csrc/cpu/queue.h"

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

bool close(double got, double expected, double tolerance) {
  return std::fabs(got - expected) <= tolerance * (1 + std::fabs(expected));
}

// Two tiles one after the other, their rows in two ranges.
bool run_softmax(int64_t rows, int64_t cols, int64_t gap, int64_t width, bool write, sslk::Isa isa, std::mt19937& random) {
  const double scale = 7.5;
  const int64_t stride = cols + gap;
  const int64_t size = rows ? (rows - 1) * stride + cols : 0;  // not one element beyond the last row
  std::normal_distribution<float> normal;
  std::unique_ptr<float[]> tile(new float[size]), mean(new float[rows * width]());
  std::unique_ptr<double[]> stats(new double[2 * rows]), top(new double[rows]), total(new double[rows]());
  std::vector<double> weighed(rows * width);
  for (int64_t i = 0; i < rows; ++i) stats[2 * i] = top[i] = -kInfinity, stats[2 * i + 1] = 0;

  for (int pass = 0; pass < 2; ++pass) {
    std::vector<float> before(size);
    for (int64_t i = 0; i < size; ++i) tile[i] = before[i] = normal(random);
    sslk::KeySoftmaxPanel panel{};
    panel.tile = tile.get();
    panel.rows = rows;
    panel.cols = cols;
    panel.row_stride = stride;
    panel.stats = stats.get();
    panel.mean = write ? mean.get() : nullptr;
    panel.width = panel.mean_stride = width;
    panel.scale = float(scale);
    sslk::key_softmax_panel(panel, 0, rows / 2, isa);
    sslk::key_softmax_panel(panel, rows / 2, rows, isa);

    for (int64_t i = 0; i < rows; ++i) {
      const double old = top[i];
      for (int64_t j = 0; j < cols; ++j) {
        const double z = scale * before[i * stride + j];
        if (z > top[i]) top[i] = z;
      }
      const double rescale = old == top[i] ? 1 : std::exp(old - top[i]);
      total[i] *= rescale;
      for (int64_t j = 0; j < stride && i * stride + j < size; ++j) {
        const double raw = before[i * stride + j], e = std::exp(scale * raw - top[i]);
        if (j < cols) total[i] += e;
        if (!close(tile[i * stride + j], write && j < cols ? e : raw, 1e-5)) return false;
      }
      if (cols && !close(scale * stats[2 * i], top[i], 1e-6)) return false;
      if (!close(stats[2 * i + 1], total[i], 1e-5)) return false;
      for (int64_t k = 0; k < width; ++k) {
        double& expected = weighed[i * width + k];
        expected *= rescale;
        if (write && !close(mean[i * width + k], expected, 1e-5)) return false;
        expected = mean[i * width + k] = normal(random);
      }
    }
  }
  return true;
}

double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

// What follows the tiles, rows in two ranges: with positives InfoNCE, without them the log-sum-exp; and the gradients.
bool run_rows(int64_t rows, int64_t width, bool positives, bool with_mean, sslk::Isa isa, std::mt19937& random) {
  const double scale = -3.5, unit = 0.25;
  std::normal_distribution<float> normal;
  const auto draw = [&](int64_t size) {
    std::unique_ptr<float[]> data(new float[size]);
    for (int64_t i = 0; i < size; ++i) data[i] = normal(random);
    return data;
  };
  const auto query = draw(rows * width), positive = draw(rows * width), weighed = draw(rows * width);
  const auto upstream = draw(rows);
  std::unique_ptr<float[]> mean(new float[rows * width]), slopes(new float[rows]);
  std::unique_ptr<float[]> by_query(new float[rows * width]), by_positive(new float[rows * width]);
  std::unique_ptr<double[]> stats(new double[2 * rows]), values(new double[rows]), by_scale(new double[rows]);
  std::memcpy(mean.get(), weighed.get(), rows * width * sizeof(float));
  for (int64_t i = 0; i < rows; ++i) stats[2 * i] = normal(random), stats[2 * i + 1] = i % 3 ? 1 + i : 0;

  sslk::KeySoftmaxRows job{};
  job.rows = rows;
  job.width = job.query_stride = job.positive_stride = width;
  job.stats = stats.get();
  job.scale = scale;
  job.mean = with_mean ? mean.get() : nullptr;
  job.values = values.get();
  job.unit = unit;
  if (positives) {
    job.slopes = slopes.get();
    job.query = query.get();
    job.positive = positive.get();
  }
  sslk::key_softmax_rows(job, 0, rows / 2, isa);
  sslk::key_softmax_rows(job, rows / 2, rows, isa);

  sslk::KeySoftmaxGradient gradient{};
  gradient.rows = rows;
  gradient.width = gradient.query_stride = width;
  gradient.query = query.get();
  gradient.pull = with_mean ? mean.get() : nullptr;
  gradient.scale = scale;
  gradient.upstream = upstream.get();
  gradient.upstream_stride = 1;
  gradient.slopes = positives ? slopes.get() : nullptr;
  gradient.by_query = with_mean ? by_query.get() : nullptr;
  gradient.by_positive = positives ? by_positive.get() : nullptr;
  gradient.by_scale = with_mean ? by_scale.get() : nullptr;
  sslk::key_softmax_gradient(gradient, 0, rows / 3, isa);
  sslk::key_softmax_gradient(gradient, rows / 3, rows, isa);

  for (int64_t i = 0; i < rows; ++i) {
    const double total = stats[2 * i + 1];
    const double lse = total == 0 ? -kInfinity : std::fabs(scale) * stats[2 * i] + std::log(total);
    double similarity = 0, along = 0;
    for (int64_t k = i * width; k < (i + 1) * width; ++k) similarity += double(query[k]) * positive[k];
    const double gap = lse - scale * similarity, value = positives ? softplus(gap) : lse;
    if (!(values[i] == value || close(values[i], value, 1e-4))) return false;
    const double slope = positives ? unit / (1 + std::exp(-gap)) : 1, f = slope * upstream[i];
    if (positives && !close(slopes[i], slope, 1e-4)) return false;
    for (int64_t k = i * width; k < (i + 1) * width; ++k) {
      const double pull = (total == 0 ? weighed[k] : weighed[k] / total) - (positives ? positive[k] : 0);
      along += query[k] * pull;
      if (with_mean && !close(mean[k], pull, 1e-5)) return false;
      if (with_mean && !close(by_query[k], f * scale * pull, 1e-4)) return false;
      if (positives && !close(by_positive[k], -f * scale * query[k], 1e-4)) return false;
    }
    if (with_mean && !close(by_scale[i], f * along, 1e-4)) return false;
  }
  return true;
}

size_t item_size(sslk::FeatureType type) { return type == sslk::FeatureType::kFloat32 ? 4 : 2; }

// Small integers are exact in every type; their bits are made here by hand.
void put(void* data, sslk::FeatureType type, int64_t index, int value) {
  const float number = float(value);
  uint32_t bits;
  std::memcpy(&bits, &number, 4);
  uint16_t half = uint16_t(bits >> 16);
  if (type == sslk::FeatureType::kFloat16) {
    half = value ? uint16_t((bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - (112u << 23)) >> 13) : 0;
  }
  char* to = static_cast<char*>(data) + index * item_size(type);
  type == sslk::FeatureType::kFloat32 ? std::memcpy(to, &bits, 4) : std::memcpy(to, &half, 2);
}

bool run_queue(int64_t size, int64_t batch, int64_t width, sslk::FeatureType queue_type, sslk::FeatureType keys_type,
               bool normalize, sslk::Isa isa) {
  const size_t item = item_size(queue_type);
  std::unique_ptr<char[]> queue(new char[size * width * item]()), keys(new char[batch * width * item_size(keys_type)]);
  std::unique_ptr<char[]> expected(new char[size * width * item]());
  const int64_t start = size - 1;
  for (int64_t i = 0; i < batch; ++i) {
    for (int64_t k = 0; k < width; ++k) {
      const int value = int((7 * i + 3 * k) % 31) - 15;
      // One feature alone, if keys are to be normalised: then its norm is exact.
      const int kept = !normalize || k == i % (width ? width : 1) ? value : 0;
      put(keys.get(), keys_type, i * width + k, kept);
      put(expected.get(), queue_type, (start + i) % size * width + k, normalize ? (kept > 0) - (kept < 0) : kept);
    }
  }
  sslk::Enqueue job{};
  job.queue = queue.get();
  job.queue_type = queue_type;
  job.size = size;
  job.queue_stride = job.keys_stride = job.width = width;
  job.keys = keys.get();
  job.keys_type = keys_type;
  job.start = start;
  job.normalize = normalize;
  const int64_t first = batch > size ? batch - size : 0, middle = (first + batch) / 2;
  sslk::enqueue_rows(job, first, middle, isa);
  sslk::enqueue_rows(job, middle, batch, isa);
  return std::memcmp(queue.get(), expected.get(), size * width * item) == 0;
}

}  // namespace

int main() {
  const sslk::FeatureType types[] = {sslk::FeatureType::kFloat32, sslk::FeatureType::kBFloat16,
                                     sslk::FeatureType::kFloat16};
  int cases = 0;
  for (sslk::Isa isa : sslk::available_isas()) {
    std::mt19937 random(0);
    for (int64_t rows : {0, 1, 5})
      for (int64_t cols : {0, 1, 3, 15, 16, 17, 63, 64, 65, 131, 1100})
        for (int64_t gap : {0, 3})
          for (int64_t width : {0, 1, 19})
            for (bool write : {false, true}) {
              ++cases;
              if (!run_softmax(rows, cols, gap, width, write, isa, random)) {
                std::printf("%s: softmax of %d rows, %d cols, gap %d, width %d, write %d\n", sslk::isa_name(isa),
                            int(rows), int(cols), int(gap), int(width), int(write));
                return 1;
              }
            }
    for (int64_t rows : {0, 1, 7})
      for (int64_t width : {0, 1, 15, 16, 17, 40, 1100})
        for (bool positives : {false, true})
          for (bool with_mean : {false, true}) {
            ++cases;
            if (!run_rows(rows, width, positives, with_mean, isa, random)) {
              std::printf("%s: %d rows of %d features, positives %d, mean %d\n", sslk::isa_name(isa), int(rows),
                          int(width), int(positives), int(with_mean));
              return 1;
            }
          }
    for (int64_t size : {1, 5})
      for (int64_t batch : {0, 1, 4, 13})
        for (int64_t width : {0, 1, 3, 16, 37})
          for (sslk::FeatureType queue_type : types)
            for (sslk::FeatureType keys_type : types)
              for (bool normalize : {false, true}) {
                ++cases;
                if (!run_queue(size, batch, width, queue_type, keys_type, normalize, isa)) {
                  std::printf("%s: queue of %d, batch %d, width %d, types %d %d, normalize %d\n", sslk::isa_name(isa),
                              int(size), int(batch), int(width), int(queue_type), int(keys_type), int(normalize));
                  return 1;
                }
              }
    std::printf("%s ok\n", sslk::isa_name(isa));
  }
  std::printf("%d cases\n", cases);
}
