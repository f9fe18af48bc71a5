// Writes a batch of keys over the oldest rows of a queue and moves its pointer on, in one launch:
//
//     queue[(pointer + r) mod K] <- key_r, of the last K keys      pointer <- (pointer + B) mod K
//
// Keys are converted to the dtype of the queue, after a division by max(||key||, 1e-12) in float if they are to be
// normalised. The host never learns the pointer, so that a CUDA graph writes each batch behind the one before.
//
// All blocks must read the pointer before one of them moves it on, in whatever order they run. Each draws a ticket and
// reads the pointer in one and the same atomic addition: tickets are counted in the pointer's high bits, above 53 that
// hold the row. Whoever draws the last one knows that all others have read the row, and replaces row and tickets by the
// new row. Nothing has to be allocated or cleared for it, two queues share nothing, and a sum of integers is the same
// in any order. A pointer has to be in [-2^52, 2^52).
//
// Budget: B rows read and B rows written, in accesses of 16 bytes for the wider of the two dtypes wherever a key and
// its row are aligned alike; to be normalised, a row is read twice, the second time from cache. A warp has a key, so
// that a norm takes five shuffles and no barrier. Loops that copy, sum squares and divide have 20 to 34 instructions
// per element together (tests/cuda/budget.json).
#include <algorithm>
#include <type_traits>

#include "../checks.h"
#include "device.h"
#include "features.h"

using sslk::FeatureType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kWidest = 1 << 30;
constexpr int kRowBits = 53;
constexpr int64_t kBlocks = 1024;  // at most: all that run at once, with tickets to spare
static_assert(kBlocks < int64_t{1} << (64 - kRowBits), "each block draws a ticket");

struct Enqueue {
  void* queue;  // [size, width], rows contiguous
  int64_t size;
  int64_t queue_stride;  // between rows, in elements; likewise below
  unsigned long long* pointer;
  const void* keys;  // [batch, width]
  int64_t batch;
  int64_t keys_stride;
  int64_t feature_stride;
  int width;
  bool normalize;
};

// The row that the first key goes to. One thread of each block calls it once.
__device__ int64_t draw_row(const Enqueue& job) {
  constexpr unsigned long long kTicket = 1ull << kRowBits;
  const unsigned long long drawn = atomicAdd(job.pointer, kTicket);
  const int64_t pointer = static_cast<int64_t>(drawn << (64 - kRowBits)) >> (64 - kRowBits);
  const unsigned long long ticket = (drawn - static_cast<unsigned long long>(pointer)) >> kRowBits;
  int64_t row = pointer % job.size;
  if (row < 0) row += job.size;
  if (ticket == gridDim.x - 1) {
    const int64_t next = (row + job.batch) % job.size;
    atomicAdd(job.pointer, static_cast<unsigned long long>(next) - (drawn + kTicket));
  }
  return row;
}

__device__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

template <typename Queue, typename Keys>
__global__ void __launch_bounds__(kThreads) enqueue_kernel(const Enqueue job) {
  constexpr int N = sslk::kVector<Queue, Keys>;
  __shared__ int64_t drawn[1];
  if (threadIdx.x == 0) drawn[0] = draw_row(job);
  __syncthreads();

  const int lane = threadIdx.x % kWarp;
  const int64_t skipped = job.batch > job.size ? job.batch - job.size : 0;  // later keys would overwrite them
  const int64_t first = (drawn[0] + skipped) % job.size;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t key = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; key < job.batch - skipped;
       key += warps) {
    const Keys* from = static_cast<const Keys*>(job.keys) + (skipped + key) * job.keys_stride;
    const int64_t row = first + key < job.size ? first + key : first + key - job.size;
    Queue* to = static_cast<Queue*>(job.queue) + row * job.queue_stride;
    int past = sslk::misalignment<N>(to);
    if (job.feature_stride != 1 || past != sslk::misalignment<N>(from)) past = -1;

    if (!job.normalize) {
      sslk::for_each_vector<N>(job.width, past, lane, kWarp, [&](auto count, int at) {
        constexpr int n = decltype(count)::value;
        const auto v = sslk::load<n>(from + at * job.feature_stride);
        sslk::Vector<Queue, n> w;
        for (int i = 0; i < n; ++i) w.element[i] = sslk::convert<Queue>(v.element[i]);
        sslk::store<n>(to + at, w);
      });
      continue;
    }
    float squares = 0;
    sslk::for_each_vector<N>(job.width, past, lane, kWarp, [&](auto count, int at) {
      const auto v = sslk::load<decltype(count)::value>(from + at * job.feature_stride);
      for (const Keys x : v.element) squares += sslk::widen(x) * sslk::widen(x);
    });
    float norm = sqrtf(warp_sum(squares));
    norm = norm < 1e-12f ? 1e-12f : norm;  // a maximum would lose NaN
    sslk::for_each_vector<N>(job.width, past, lane, kWarp, [&](auto count, int at) {
      constexpr int n = decltype(count)::value;
      const auto v = sslk::load<n>(from + at * job.feature_stride);
      sslk::Vector<Queue, n> w;
      for (int i = 0; i < n; ++i) w.element[i] = sslk::narrow<Queue>(sslk::widen(v.element[i]) / norm);
      sslk::store<n>(to + at, w);
    });
  }
}

void check_features(const Tensor& t, const char* name, const Tensor& queue) {
  STD_TORCH_CHECK(sslk::is_on(t, queue), name, ": expected a CUDA tensor on the device of queue");
  STD_TORCH_CHECK(t.dim() == 2, name, ": expected 2 dimensions, got ", t.dim());
}

void enqueue_cuda(Tensor queue, Tensor pointer, Tensor keys, bool normalize) {
  check_features(queue, "queue", queue);
  check_features(keys, "keys", queue);
  sslk::check_size(keys, "keys", 1, queue.size(1));
  STD_TORCH_CHECK(queue.size(0) > 0, "queue: expected at least 1 row, got 0");
  STD_TORCH_CHECK(queue.size(1) <= kWidest, "queue: expected at most ", kWidest, " columns, got ", queue.size(1));
  STD_TORCH_CHECK(queue.size(1) <= 1 || queue.stride(1) == 1, "queue: expected unit stride along columns, got ",
                  queue.stride(1));
  STD_TORCH_CHECK(queue.size(0) == 1 || queue.stride(0) >= queue.size(1),
                  "queue: expected rows that do not overlap, got stride ", queue.stride(0), " for ", queue.size(1),
                  " columns");
  STD_TORCH_CHECK(sslk::is_on(pointer, queue) && pointer.scalar_type() == ScalarType::Long && pointer.numel() == 1,
                  "pointer: expected one int64 element on the device of queue");

  Enqueue job{};
  job.queue = queue.mutable_data_ptr();
  job.size = queue.size(0);
  job.queue_stride = queue.stride(0);
  job.pointer = static_cast<unsigned long long*>(pointer.mutable_data_ptr());
  job.keys = keys.const_data_ptr();
  job.batch = keys.size(0);
  job.keys_stride = keys.stride(0);
  job.feature_stride = keys.stride(1);
  job.width = static_cast<int>(queue.size(1));
  job.normalize = normalize;

  const int64_t rows = std::min(job.batch, job.size);
  const int64_t blocks = std::clamp<int64_t>((rows + kWarps - 1) / kWarps, 1, kBlocks);
  const sslk::Device device(queue);
  sslk::with_type(sslk::feature_type(queue, "queue"), [&](auto* queue_type) {
    sslk::with_type(sslk::feature_type(keys, "keys"), [&](auto* keys_type) {
      using Queue = std::remove_pointer_t<decltype(queue_type)>;
      using Keys = std::remove_pointer_t<decltype(keys_type)>;
      sslk::launch("enqueue_", device, enqueue_kernel<Queue, Keys>, static_cast<unsigned>(blocks), kThreads, job);
    });
  });
}

}  // namespace

SSLK_CUDA_LIBRARY(m) {
  m.def("enqueue_cuda_(Tensor(a!) queue, Tensor(b!) pointer, Tensor keys, bool normalize) -> ()");
}

SSLK_CUDA_IMPL(m) { m.impl("enqueue_cuda_", TORCH_BOX(&enqueue_cuda)); }
