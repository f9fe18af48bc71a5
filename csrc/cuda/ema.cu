// Moves a list of CUDA tensors towards another, all of them in one launch where a launch's parameters hold them:
//
//     target <- target + (1 - m) (source - target)      copy <- target
//
// in float, each tensor in its own dtype, the copy in a third. A momentum m of 1 keeps every bit of the target and one
// of 0 takes the source, whatever the other is; infinities that agree stay. Arithmetic and rounding are those of the
// CPU kernel. The momentum is a parameter, or is read on the device, where a CUDA graph finds its latest value.
//
// Budget, for each element: the target read and written, the source read, the copy written: 12 bytes in float, 14 with
// a copy in 16 bits, in accesses of 16 bytes for the wider of target and source wherever both and the copy are aligned
// alike. By model, not by measurement: a thread keeps one access to each in flight, 32 bytes, and a multiprocessor with
// 1,280 threads 40 KB, where 3.35 TB/s and 700 ns ask for 18 KB of each of an H100's 132; at that bandwidth and 1.7 GHz
// its 128 lanes can issue 100 instructions for an element of 12 bytes. The loops have 17 to 20 with every way to store
// a copy, of which one runs (tests/cuda/budget.json).
#include <type_traits>
#include <vector>

#include "../ema_lists.h"
#include "device.h"
#include "features.h"

using sslk::FeatureType;
using torch::stable::Tensor;

namespace {

constexpr int kThreads = 256;
constexpr int kBlock = 8192;  // elements: whole vectors of each type, four passes of 8 or eight of 4
constexpr int kTensors = 104;

// By value in the parameters of a launch: no copy to the device, and a CUDA graph holds it.
struct Tensors {
  void* target[kTensors];
  const void* source[kTensors];
  void* copy[kTensors];  // or null
  int64_t size[kTensors];
  uint32_t first_block[kTensors];  // each tensor has blocks of its own; 2^32 of them are more than any memory
  uint8_t target_type[kTensors];
  uint8_t source_type[kTensors];
  uint8_t copy_type[kTensors];
  int count;
};

struct Momentum {
  const void* device;  // a number there, or null
  bool is_double;
  float weight;  // 1 - momentum, where it is known here
};

static_assert(sizeof(Tensors) + sizeof(Momentum) <= 4096, "what a launch takes on every driver");

__device__ float weight_of(const Momentum& m) {
  if (!m.device) return m.weight;
  const double momentum = m.is_double ? *static_cast<const double*>(m.device) : *static_cast<const float*>(m.device);
  return static_cast<float>(1 - momentum);
}

template <typename Target, typename Source>
__device__ Target move(Target target, Source source, float weight) {
  if (weight == 0) return target;
  if (weight == 1) return sslk::convert<Target>(source);
  const float old = sslk::widen(target), goal = sslk::widen(source);
  const float moved = fmaf(weight, goal - old, old);
  return sslk::narrow<Target>(goal == old && weight == weight ? old : moved);
}

template <int N, typename Copy, typename Target>
__device__ void store_as(Copy* copy, const sslk::Vector<Target, N>& v) {
  sslk::Vector<Copy, N> converted;
  for (int i = 0; i < N; ++i) converted.element[i] = sslk::convert<Copy>(v.element[i]);
  sslk::store<N>(copy, converted);
}

// `size` elements from `begin` of tensor t on.
template <typename Target, typename Source>
__device__ void move_block(const Tensors& tensors, int t, int64_t begin, int size, float weight) {
  constexpr int N = sslk::kVector<Target, Source>;
  Target* target = static_cast<Target*>(tensors.target[t]) + begin;
  const Source* source = static_cast<const Source*>(tensors.source[t]) + begin;
  void* copy = tensors.copy[t];
  const FeatureType copy_type = static_cast<FeatureType>(tensors.copy_type[t]);

  int past = sslk::misalignment<N>(target);
  if (past != sslk::misalignment<N>(source)) past = -1;
  if (copy) {
    sslk::with_type(copy_type, [&](auto* type) {
      if (past != sslk::misalignment<N>(static_cast<decltype(type)>(copy) + begin)) past = -1;
    });
  }
  sslk::for_each_vector<N>(size, past, threadIdx.x, kThreads, [&](auto width, int at) {
    constexpr int count = decltype(width)::value;
    auto moved = sslk::load<count>(target + at);
    const auto goal = sslk::load<count>(source + at);
    for (int i = 0; i < count; ++i) moved.element[i] = move(moved.element[i], goal.element[i], weight);
    sslk::store<count>(target + at, moved);
    if (copy) {
      sslk::with_type(copy_type, [&](auto* type) {
        store_as<count>(static_cast<decltype(type)>(copy) + begin + at, moved);
      });
    }
  });
}

__global__ void __launch_bounds__(kThreads) ema_kernel(const Tensors tensors, const Momentum momentum) {
  int t = 0;  // the last tensor that begins at this block or before
  for (int end = tensors.count; end - t > 1;) {
    const int middle = (t + end) / 2;
    if (tensors.first_block[middle] <= blockIdx.x) {
      t = middle;
    } else {
      end = middle;
    }
  }
  const int64_t begin = static_cast<int64_t>(blockIdx.x - tensors.first_block[t]) * kBlock;
  const int64_t left = tensors.size[t] - begin;
  const int size = left < kBlock ? static_cast<int>(left) : kBlock;
  const float weight = weight_of(momentum);
  if (weight == 0 && !tensors.copy[t]) return;

  sslk::with_type(static_cast<FeatureType>(tensors.target_type[t]), [&](auto* target_type) {
    sslk::with_type(static_cast<FeatureType>(tensors.source_type[t]), [&](auto* source_type) {
      using Target = std::remove_pointer_t<decltype(target_type)>;
      using Source = std::remove_pointer_t<decltype(source_type)>;
      move_block<Target, Source>(tensors, t, begin, size, weight);
    });
  });
}

void ema_update_cuda(std::vector<Tensor> targets, std::vector<Tensor> sources, std::vector<Tensor> copies,
                     double momentum, std::optional<Tensor> device_momentum) {
  if (targets.empty()) return;
  const auto is_here = [&](const Tensor& t) { return sslk::is_on(t, targets[0]); };
  const std::vector<sslk::EmaTensor> tensors =
      sslk::ema_tensors(targets, sources, copies, is_here, "a CUDA tensor on the device of targets[0]");

  Momentum m{};
  if (device_momentum) {
    const auto dtype = device_momentum->scalar_type();
    m.is_double = dtype == torch::headeronly::ScalarType::Double;
    STD_TORCH_CHECK(is_here(*device_momentum), "device_momentum: expected a tensor on the device of targets[0]");
    STD_TORCH_CHECK(m.is_double || dtype == torch::headeronly::ScalarType::Float,
                    "device_momentum: expected dtype Float or Double, got ", torch::headeronly::toString(dtype));
    STD_TORCH_CHECK(device_momentum->numel() == 1, "device_momentum: expected one element, got ",
                    device_momentum->numel());
    m.device = device_momentum->const_data_ptr();
  } else {
    STD_TORCH_CHECK(momentum >= 0 && momentum <= 1, "momentum: expected a number in [0, 1], got ", momentum);
    m.weight = static_cast<float>(1 - momentum);
  }

  const sslk::Device device(targets[0]);
  Tensors batch{};
  uint32_t blocks = 0;
  const auto flush = [&] {
    if (blocks > 0) sslk::launch("ema_update_", device, ema_kernel, blocks, kThreads, batch, m);
    batch.count = 0;
    blocks = 0;
  };
  for (const sslk::EmaTensor& t : tensors) {
    if (t.size == 0) continue;
    const int i = batch.count++;
    batch.target[i] = t.target;
    batch.source[i] = t.source;
    batch.copy[i] = t.copy;
    batch.size[i] = t.size;
    batch.first_block[i] = blocks;
    batch.target_type[i] = static_cast<uint8_t>(t.target_type);
    batch.source_type[i] = static_cast<uint8_t>(t.source_type);
    batch.copy_type[i] = static_cast<uint8_t>(t.copy_type);
    blocks += static_cast<uint32_t>((t.size + kBlock - 1) / kBlock);
    if (batch.count == kTensors) flush();
  }
  flush();
}

}  // namespace

SSLK_CUDA_LIBRARY(m) {
  m.def(
      "ema_update_cuda_(Tensor(a!)[] targets, Tensor[] sources, Tensor(b!)[] copies, float momentum, "
      "Tensor? device_momentum) -> ()");
}

SSLK_CUDA_IMPL(m) { m.impl("ema_update_cuda_", TORCH_BOX(&ema_update_cuda)); }
