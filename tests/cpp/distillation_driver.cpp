// Runs the kernels of DINO and of Sinkhorn-Knopp on every instruction set, in buffers of exactly the right size, and
// compares them with plain double arithmetic. Built with sanitizers, and once without any x86 code, by test_build.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cpu/dino.h"
#include "../../csrc/cpu/sinkhorn.h"

namespace {

using sslk::FeatureType;

bool close(double got, double expected, double tolerance) {
  return std::fabs(got - expected) <= tolerance * (1 + std::fabs(expected));
}

// Logits that every type holds exactly, and their values.
struct Logits {
  std::unique_ptr<char[]> data;
  std::vector<double> values;

  Logits(int64_t count, FeatureType type, std::mt19937& random) : data(new char[count * item(type)]), values(count) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = float(int(random() % 65) - 32) / 16;
      values[i] = value;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      uint16_t half = uint16_t(bits >> 16);
      if (type == FeatureType::kFloat16) half = value != 0 ? (half & 0x8000) | ((bits & 0x7fffffff) - (112u << 23)) >> 13 : 0;
      const void* from = type == FeatureType::kFloat32 ? static_cast<void*>(&bits) : &half;
      std::memcpy(data.get() + i * item(type), from, item(type));
    }
  }

  static int64_t item(FeatureType type) { return type == FeatureType::kFloat32 ? 4 : 2; }
};

double read(const char* data, FeatureType type, int64_t i) {
  if (type == FeatureType::kFloat32) {
    float value;
    std::memcpy(&value, data + 4 * i, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, data + 2 * i, 2);
  if (type == FeatureType::kBFloat16) {
    const uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

std::vector<double> softmax(const double* logits, const float* center, int64_t width, double temp) {
  std::vector<double> p(width);
  for (int64_t k = 0; k < width; ++k) p[k] = (logits[k] - (center ? center[k] : 0)) / temp;
  const double top = *std::max_element(p.begin(), p.end());
  double total = 0;
  for (double& v : p) total += v = std::exp(v - top);
  for (double& v : p) v /= total;
  return p;
}

bool run_dino(int64_t crops, int64_t teachers, int64_t samples, int64_t width, FeatureType student_type,
              FeatureType teacher_type, bool distinct, bool plain, sslk::Isa isa, std::mt19937& random) {
  const double student_temp = 0.25, teacher_temp = 0.125;
  const Logits student(crops * samples * width, student_type, random);
  const Logits teacher(teachers * samples * width, teacher_type, random);
  std::unique_ptr<float[]> center(new float[width]), weights(new float[samples]), losses(new float[samples]);
  std::unique_ptr<float[]> sum(new float[width]());
  std::unique_ptr<char[]> gradient(new char[student.values.size() * Logits::item(student_type)]);
  for (int64_t k = 0; k < width; ++k) center[k] = float(k % 3) / 4;
  for (int64_t b = 0; b < samples; ++b) weights[b] = 0.5f + b;

  std::vector<sslk::Crop> ours, theirs;
  for (int64_t v = 0; v < crops; ++v) {
    ours.push_back({student.data.get() + v * samples * width * Logits::item(student_type), width});
  }
  for (int64_t t = 0; t < teachers; ++t) {
    theirs.push_back({teacher.data.get() + t * samples * width * Logits::item(teacher_type), width});
  }
  sslk::Dino job{};
  job.students = ours.data();
  job.n_students = crops;
  job.student_type = student_type;
  job.teachers = theirs.data();
  job.n_teachers = teachers;
  job.teacher_type = teacher_type;
  job.width = width;
  job.center = plain ? nullptr : center.get();
  job.weights = plain ? nullptr : weights.get();
  job.student_scale = float(1 / student_temp);
  job.teacher_scale = float(1 / teacher_temp);
  job.distinct = distinct;
  job.losses = losses.get();
  job.gradient = gradient.get();
  job.stream_gradient = plain;
  job.samples = samples;
  job.gradient_scale = float(1 / student_temp);
  std::unique_ptr<float[]> scratch(new float[sslk::dino_scratch(job)]);
  sslk::dino_rows(job, 0, samples / 2, scratch.get(), sum.get(), isa);
  sslk::dino_rows(job, samples / 2, samples, scratch.get(), sum.get(), isa);

  const double tolerance = student_type == FeatureType::kFloat32 ? 1e-5 : 1e-2;
  for (int64_t b = 0; b < samples; ++b) {
    std::vector<std::vector<double>> p;
    for (int64_t t = 0; t < teachers; ++t) {
      p.push_back(softmax(&teacher.values[(t * samples + b) * width], job.center, width, teacher_temp));
    }
    const double weight = plain ? 1 : weights[b];
    double loss = 0;
    for (int64_t v = 0; v < crops; ++v) {
      const int64_t row = (v * samples + b) * width;
      const std::vector<double> s = softmax(&student.values[row], nullptr, width, student_temp);
      for (int64_t k = 0; k < width; ++k) {
        double expected = 0;
        for (int64_t t = 0; t < teachers; ++t) {
          if (distinct && t == v) continue;
          loss -= p[t][k] * std::log(s[k]);
          expected += weight * (s[k] - p[t][k]) / student_temp;
        }
        if (!close(read(gradient.get(), student_type, row + k), expected, tolerance)) return false;
      }
    }
    if (!close(losses[b], weight * loss, 1e-5)) return false;
  }
  for (int64_t k = 0; k < width; ++k) {
    double expected = 0;
    for (int64_t row = 0; row < teachers * samples; ++row) expected += teacher.values[row * width + k];
    if (!close(sum[k], expected, 1e-6)) return false;
  }
  return true;
}

bool run_sinkhorn(int64_t rows, int64_t width, FeatureType type, bool centered, double temp, sslk::Isa isa,
                  std::mt19937& random) {
  const Logits logits(rows * width, type, random);
  std::unique_ptr<float[]> center(new float[width]), maxima(new float[width]), totals(new float[width]);
  std::unique_ptr<float[]> sums(new float[width]()), out(new float[rows * width]);
  for (int64_t k = 0; k < width; ++k) center[k] = float(k % 3) / 4;
  sslk::Sinkhorn job{};
  job.logits = logits.data.get();
  job.type = type;
  job.rows = rows;
  job.width = job.stride = width;
  job.center = centered ? center.get() : nullptr;
  job.scale = float(1 / temp);
  std::unique_ptr<float[]> scratch(new float[sslk::sinkhorn_scratch(job)]);
  for (int64_t row = 0; row < rows; row += 8) {  // as many as are taken at a time
    sslk::Sinkhorn part = job;
    part.logits = logits.data.get() + row * width * Logits::item(type);
    part.rows = std::min<int64_t>(rows - row, 8);
    sslk::sinkhorn_column_lse(part, 0, width / 2, maxima.get(), totals.get(), row > 0, isa);
    sslk::sinkhorn_column_lse(part, width / 2, width, maxima.get(), totals.get(), row > 0, isa);
  }
  sslk::sinkhorn_column_sums(job, 0, rows / 2, scratch.get(), sums.get(), isa);
  sslk::sinkhorn_column_sums(job, rows / 2, rows, scratch.get(), sums.get(), isa);
  sslk::centered_softmax(job, 0, rows / 2, scratch.get(), out.get(), isa);
  sslk::centered_softmax(job, rows / 2, rows, scratch.get(), out.get(), isa);

  std::vector<double> expected(width);
  for (int64_t i = 0; i < rows; ++i) {
    const std::vector<double> p = softmax(&logits.values[i * width], job.center, width, temp);
    for (int64_t k = 0; k < width; ++k) {
      expected[k] += p[k];
      if (!close(out[i * width + k], p[k], 1e-6)) return false;
    }
  }
  for (int64_t k = 0; k < width; ++k) {
    double top = logits.values[k], total = 0;
    for (int64_t i = 1; i < rows; ++i) top = std::max(top, logits.values[i * width + k]);
    for (int64_t i = 0; i < rows; ++i) total += std::exp((logits.values[i * width + k] - top) / temp);
    if (maxima[k] != top || !close(totals[k], total, 1e-5) || !close(sums[k], expected[k], 1e-5)) return false;
  }
  return true;
}

}  // namespace

int main() {
  const FeatureType types[] = {FeatureType::kFloat32, FeatureType::kBFloat16, FeatureType::kFloat16};
  int cases = 0;
  for (sslk::Isa isa : sslk::available_isas()) {
    std::mt19937 random(0);
    for (int64_t width : {1, 3, 15, 16, 17, 64, 131, 512, 513, 2048, 2051, 4099})
      for (FeatureType type : types) {
        for (int64_t teachers : {1, 2, 3})
          for (FeatureType teacher_type : types)
            for (bool distinct : {false, true})
              for (bool plain : {false, true}) {
                // A seventh of the wide ones, in which any two of the other parameters meet.
                if (++cases % 7 && width > 511) continue;
                if (!run_dino(4, teachers, 3, width, type, teacher_type, distinct, plain, isa, random)) {
                  std::printf("%s: dino of %d teachers, width %d, types %d %d, distinct %d, plain %d\n",
                              sslk::isa_name(isa), int(teachers), int(width), int(type), int(teacher_type), distinct,
                              plain);
                  return 1;
                }
              }
        for (int64_t rows : {1, 2, 7, 8, 9, 19})
          for (bool centered : {false, true}) {
            ++cases;
            const double temp = rows == 2 ? 1. / 256 : 0.125;  // at 1/256 exponents are far below those of floats
            if (!run_sinkhorn(rows, width, type, centered, temp, isa, random)) {
              std::printf("%s: sinkhorn of %d rows, width %d, type %d, centered %d\n", sslk::isa_name(isa), int(rows),
                          int(width), int(type), centered);
              return 1;
            }
          }
      }
    std::printf("%s ok\n", sslk::isa_name(isa));
  }
  std::printf("%d cases\n", cases);
}
