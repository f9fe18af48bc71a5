// Runs the exponential moving average on every instruction set, in buffers of exactly the right size, and compares it
// with plain double arithmetic. Built with sanitizers, and once without any x86 code, by test_build.py.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/cpu/ema.h"

namespace {

constexpr sslk::FeatureType kTypes[] = {sslk::FeatureType::kFloat32, sslk::FeatureType::kBFloat16,
                                        sslk::FeatureType::kFloat16};

size_t item_size(sslk::FeatureType type) { return type == sslk::FeatureType::kFloat32 ? 4 : 2; }

// Small numbers that are exact in every type; their bits are made and read here by hand.
void put(void* data, sslk::FeatureType type, int64_t index, float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, 4);
  uint16_t half = uint16_t(bits >> 16);
  if (type == sslk::FeatureType::kFloat16) {
    half = number != 0 ? uint16_t((bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - (112u << 23)) >> 13) : 0;
  }
  char* to = static_cast<char*>(data) + index * item_size(type);
  type == sslk::FeatureType::kFloat32 ? std::memcpy(to, &bits, 4) : std::memcpy(to, &half, 2);
}

float get(const void* data, sslk::FeatureType type, int64_t index) {
  const char* from = static_cast<const char*>(data) + index * item_size(type);
  uint32_t bits = 0;
  uint16_t half;
  if (type == sslk::FeatureType::kFloat32) {
    std::memcpy(&bits, from, 4);
  } else {
    std::memcpy(&half, from, 2);
    bits = uint32_t(half) << 16;
    if (type == sslk::FeatureType::kFloat16) {
      bits = (half & 0x7fff) ? (uint32_t(half) & 0x8000) << 16 | ((uint32_t(half & 0x7fff) << 13) + (112u << 23)) : 0;
    }
  }
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}

// Lists of tensors of these sizes, whose blocks are visited in `parts` ranges.
bool run(const std::vector<int64_t>& sizes, int shift, double momentum, int64_t parts, sslk::Isa isa) {
  std::vector<std::unique_ptr<char[]>> memory;
  std::vector<sslk::EmaTensor> tensors;
  for (size_t i = 0; i < sizes.size(); ++i) {
    sslk::EmaTensor t{};
    t.size = sizes[i];
    t.target_type = kTypes[i % 3];
    t.source_type = kTypes[(i / 3 + shift) % 3];
    t.copy_type = kTypes[(i + shift) % 3];
    for (sslk::FeatureType type : {t.target_type, t.source_type, t.copy_type}) {
      memory.emplace_back(new char[t.size * item_size(type)]);
    }
    t.target = memory[3 * i].get();
    t.source = memory[3 * i + 1].get();
    t.copy = i % 2 ? memory[3 * i + 2].get() : nullptr;
    for (int64_t k = 0; k < t.size; ++k) {
      put(t.target, t.target_type, k, float((7 * k + int64_t(i)) % 31 - 15));
      put(memory[3 * i + 1].get(), t.source_type, k, float((3 * k + 5) % 29 - 14) * 0.5f);
    }
    tensors.push_back(t);
  }
  const sslk::Ema ema(tensors, momentum);
  for (int64_t part = 0; part < parts; ++part) {
    ema.update(ema.blocks() * part / parts, ema.blocks() * (part + 1) / parts, isa);
  }
  for (size_t i = 0; i < sizes.size(); ++i) {
    const sslk::EmaTensor& t = tensors[i];
    const double tolerance = t.target_type == sslk::FeatureType::kFloat32 ? 1e-6 : 8e-3;
    for (int64_t k = 0; k < t.size; ++k) {
      const double old = double((7 * k + int64_t(i)) % 31 - 15), source = double((3 * k + 5) % 29 - 14) * 0.5;
      const double expected = momentum * old + (1 - momentum) * source, got = get(t.target, t.target_type, k);
      if (!(std::fabs(got - expected) <= tolerance * 16)) return false;
      if (t.copy && !(std::fabs(get(t.copy, t.copy_type, k) - got) <= 8e-3 * (1 + std::fabs(got)))) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  const std::vector<std::vector<int64_t>> lists = {
      {}, {0}, {1}, {0, 1, 0, 63, 64, 65, 0}, {5000}, {1, 2, 3, 15, 16, 17, 1023, 1024, 1025, 2048, 130, 4, 0}};
  int cases = 0;
  for (sslk::Isa isa : sslk::available_isas()) {
    for (const std::vector<int64_t>& sizes : lists)
      for (int shift : {0, 1, 2})
        for (double momentum : {0., 0.25, 0.75, 1.})
          for (int64_t parts : {1, 2, 3, 200}) {
            ++cases;
            if (!run(sizes, shift, momentum, parts, isa)) {
              std::printf("%s: %d tensors, shift %d, momentum %g, %d parts\n", sslk::isa_name(isa), int(sizes.size()),
                          shift, momentum, int(parts));
              return 1;
            }
          }
    std::printf("%s ok\n", sslk::isa_name(isa));
  }
  std::printf("%d cases\n", cases);
}
