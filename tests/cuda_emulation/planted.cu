// Kernels with a bug each, and beside each its twin without: what the emulator must refuse, and what it must not.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <memory>

namespace {

constexpr int kThreads = 128;
constexpr unsigned kAll = 0xffffffffu;

using Kernel = void (*)(const float*, float*);

template <typename... Parameters, typename... Arguments>
int launch(dim3 blocks, dim3 threads, size_t shared_bytes, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

__device__ float warp_sum(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kAll, v, offset);
  return v;
}

template <bool kBug>
__global__ void sum_without_barrier(const float* in, float* out) {
  __shared__ float part[kThreads / 32];
  const float v = warp_sum(in[blockIdx.x * kThreads + threadIdx.x]);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  if (!kBug) __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = part[0] + part[1] + part[2] + part[3];
}

// Thread 0 writes again what others may still have to read.
template <bool kBug>
__global__ void loop_without_second_barrier(const float*, float* out) {
  __shared__ float value;
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) value = i + 1.f;
    __syncthreads();
    out[threadIdx.x * 2 + i] = value;
    if (!kBug) __syncthreads();
  }
}

template <bool kBug>
__global__ void exchange_in_warp(const float*, float* out) {
  __shared__ float lanes[32];
  lanes[threadIdx.x] = threadIdx.x;
  if (!kBug) __syncwarp();
  out[threadIdx.x] = lanes[31 - threadIdx.x];
}

// All have read when lane 0 writes, but a shuffle promises nothing about memory.
template <bool kBug>
__global__ void shuffle_for_syncwarp(const float*, float* out) {
  __shared__ float value;
  if (threadIdx.x == 0) value = 1;
  __syncthreads();
  const float sum = warp_sum(value);
  if (!kBug) __syncwarp();
  if (threadIdx.x == 0) value = sum;
  __syncthreads();
  out[threadIdx.x] = value;
}

template <bool kBug>
__global__ void divergent_barrier(const float*, float* out) {
  if (threadIdx.x < (kBug ? 40 : kThreads)) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

template <bool kBug>
__global__ void exit_before_barrier(const float*, float* out) {
  if (kBug && threadIdx.x == 7) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

template <bool kBug>
__global__ void lost_shuffle(const float*, float* out) {
  float v = 1;
  if (!kBug || threadIdx.x < 16) v = __shfl_down_sync(kAll, v, 1);
  __syncthreads();
  out[threadIdx.x] = v;
}

template <bool kBug>
__global__ void shuffle_outside_mask(const float*, float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(kBug ? 0xff00u : 0xffffu, 1.f, 1);
}

template <bool kBug>
__global__ void shuffle_from_outside(const float*, float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1.f, kBug ? 20 : 3);
}

template <bool kBug>
__global__ void shuffles_with_two_masks(const float*, float* out) {
  out[threadIdx.x] = __shfl_xor_sync(kBug && threadIdx.x == 5 ? 0xffu : kAll, 1.f, 1);
}

template <bool kBug>
__global__ void uninitialised_shared(const float*, float* out) {
  __shared__ int count[kThreads];
  if (!kBug || threadIdx.x != 9) count[threadIdx.x] = 0;
  out[threadIdx.x] = static_cast<float>(count[threadIdx.x]);
}

// Each block finds what the one before has left.
template <bool kBug>
__global__ void uninitialised_dynamic(const float*, float* out) {
  extern __shared__ float values[];
  if (!kBug || blockIdx.x == 0) values[threadIdx.x] = 1;
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[threadIdx.x];
}

template <bool kBug>
__global__ void misaligned_vector(const float* in, float* out) {
  const float4 v = *reinterpret_cast<const float4*>(in + (kBug ? 2 : 4));
  out[0] = v.x;
}

// Neighbouring blocks write the element between them.
template <bool kBug>
__global__ void race_of_blocks(const float*, float* out) {
  out[blockIdx.x * (kBug ? kThreads - 1 : kThreads) + threadIdx.x] = 1;
}

template <bool kBug>
__global__ void race_of_read_and_write(const float*, float* out) {
  const float other = kBug && blockIdx.x == 0 ? out[kThreads] : 1.f;
  out[blockIdx.x * kThreads + threadIdx.x] = other;
}

// In all blocks by the thread of the same index.
template <bool kBug>
__global__ void read_before_write(const float*, float* out) {
  out[1 + blockIdx.x] = kBug ? *out : 1.f;
  if (blockIdx.x == 1) *out = 1;
}

template <bool kBug>
__global__ void read_among_atomics(const float*, float* out) {
  atomicAdd(out, 1.f);
  if (kBug && blockIdx.x == 1) out[1] = *out;
}

template <bool kBug>
__global__ void write_among_atomics(const float*, float* out) {
  if (atomicAdd(out, 1.f) < 1) return;
  if (kBug) {
    *out = 5;
  } else {
    atomicAdd(out, 3.f);
  }
}

// What another warp may still have to read.
template <bool kBug>
__global__ void syncwarp_for_barrier(const float*, float* out) {
  __shared__ float value;
  if (threadIdx.x == 0) value = 1;
  __syncthreads();
  out[threadIdx.x] = value;
  if (kBug) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  if (threadIdx.x == 0) value = 2;
}

template <bool kBug>
__global__ void count_threads(const float*, float* out) {
  if (kBug) {
    *out += 1;
  } else {
    atomicAdd(out, 1.f);
  }
}

template <bool kBug>
__global__ void spin_for_other_block(const float*, float* out) {
  if (blockIdx.x == 0) {
    while (kBug && atomicAdd(out, 0.f) < 1) {
    }
  } else {
    atomicAdd(out, 1.f);
  }
}

template <bool kBug>
__global__ void global_out_of_bounds(const float*, float* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x + (kBug ? 1 : 0)] = 1;
}

template <bool kBug>
__global__ void shared_out_of_bounds(const float*, float* out) {
  __shared__ float values[33];
  if (threadIdx.x < 33) values[threadIdx.x + (kBug ? 1 : 0)] = 1;
  __syncthreads();
  out[threadIdx.x] = 1;
}

template <bool kBug>
__global__ void dynamic_out_of_bounds(const float*, float* out) {
  extern __shared__ __align__(16) float values[];
  values[threadIdx.x + (kBug ? 1 : 0)] = 1;
  out[threadIdx.x] = 1;
}

struct Large {
  char bytes[4096];
};
__global__ void takes_4096_bytes(Large) {}
__global__ void takes_4100_bytes(Large, int) {}

__global__ void nothing() {}

__global__ void widen(const __half* h, const __nv_bfloat16* b, float* from_h, float* from_b) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  from_h[i] = __half2float(h[i]);
  from_b[i] = __bfloat162float(b[i]);
}

__global__ void narrow(const float* x, __half* h, __nv_bfloat16* b) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  h[i] = __float2half_rn(x[i]);
  b[i] = __float2bfloat16_rn(x[i]);
}

__global__ void warp_functions(int* out) {
  const int lane = threadIdx.x;
  int* mine = out + 8 * lane;
  mine[0] = __shfl_sync(kAll, lane, 5);
  mine[1] = __shfl_sync(kAll, lane, 3, 8);
  mine[2] = __shfl_xor_sync(kAll, lane, 3);
  mine[3] = __shfl_down_sync(kAll, lane, 4, 16);
  mine[4] = __shfl_up_sync(kAll, lane, 4, 16);
  mine[5] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  mine[6] = __any_sync(kAll, lane == 31);
  mine[7] = __all_sync(kAll, lane < 31);
}

__global__ void record_order(int* next, int* order) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  order[atomicAdd(next, 1)] = block * 32 + thread;
}

// In buffers of exactly these sizes, of which the second is returned.
int run(Kernel kernel, unsigned blocks, unsigned threads, size_t shared_bytes, int in_size, int out_size,
        float* result) {
  const std::unique_ptr<float[]> in(new float[in_size]), out(new float[out_size]());
  std::fill_n(in.get(), in_size, 1.f);
  const int error = launch(blocks, threads, shared_bytes, kernel, in.get(), out.get());
  std::copy_n(out.get(), out_size, result);
  return error;
}

}  // namespace

// Each returns a cudaError_t.
#define SSLK_EXPORT extern "C" __attribute__((visibility("default")))
#define SSLK_PLANTED(kernel, blocks, threads, shared_bytes, in_size, out_size)                                       \
  SSLK_EXPORT int run_##kernel(bool bug, float* result) {                                                            \
    return run(bug ? kernel<true> : kernel<false>, blocks, threads, shared_bytes, in_size, out_size, result);        \
  }

SSLK_PLANTED(sum_without_barrier, 2, kThreads, 0, 2 * kThreads, 2)
SSLK_PLANTED(loop_without_second_barrier, 1, kThreads, 0, 0, 2 * kThreads)
SSLK_PLANTED(exchange_in_warp, 1, 32, 0, 0, 32)
SSLK_PLANTED(shuffle_for_syncwarp, 1, 32, 0, 0, 32)
SSLK_PLANTED(divergent_barrier, 1, kThreads, 0, 0, kThreads)
SSLK_PLANTED(exit_before_barrier, 1, kThreads, 0, 0, kThreads)
SSLK_PLANTED(lost_shuffle, 1, 32, 0, 0, 32)
SSLK_PLANTED(shuffle_outside_mask, 1, 32, 0, 0, 16)
SSLK_PLANTED(shuffle_from_outside, 1, 32, 0, 0, 16)
SSLK_PLANTED(shuffles_with_two_masks, 1, 32, 0, 0, 32)
SSLK_PLANTED(uninitialised_shared, 1, kThreads, 0, 0, kThreads)
SSLK_PLANTED(uninitialised_dynamic, 2, kThreads, kThreads * sizeof(float), 0, 2 * kThreads)
SSLK_PLANTED(misaligned_vector, 1, 1, 0, 8, 1)
SSLK_PLANTED(race_of_blocks, 2, kThreads, 0, 0, 2 * kThreads)
SSLK_PLANTED(race_of_read_and_write, 2, kThreads, 0, 0, 2 * kThreads)
SSLK_PLANTED(read_before_write, 2, 1, 0, 0, 3)
SSLK_PLANTED(read_among_atomics, 2, 1, 0, 0, 2)
SSLK_PLANTED(write_among_atomics, 2, 1, 0, 0, 1)
SSLK_PLANTED(syncwarp_for_barrier, 1, kThreads, 0, 0, kThreads)
SSLK_PLANTED(count_threads, 3, 40, 0, 0, 1)
SSLK_PLANTED(spin_for_other_block, 2, 1, 0, 0, 1)
SSLK_PLANTED(global_out_of_bounds, 2, 24, 0, 0, 48)
SSLK_PLANTED(shared_out_of_bounds, 1, 64, 0, 0, 64)
SSLK_PLANTED(dynamic_out_of_bounds, 1, 40, 40 * sizeof(float), 0, 40)

SSLK_EXPORT int launch_nothing(unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                               size_t shared_bytes) {
  return launch(dim3(gx, gy, gz), dim3(bx, by, bz), shared_bytes, nothing);
}
SSLK_EXPORT int launch_with_4096_bytes() { return launch(1, 1, 0, takes_4096_bytes, Large{}); }
SSLK_EXPORT int launch_with_4100_bytes() { return launch(1, 1, 0, takes_4100_bytes, Large{}, 0); }
SSLK_EXPORT int run_widen(unsigned blocks, const __half* h, const __nv_bfloat16* b, float* from_h, float* from_b) {
  return launch(blocks, 64, 0, widen, h, b, from_h, from_b);
}
SSLK_EXPORT int run_narrow(unsigned blocks, const float* x, __half* h, __nv_bfloat16* b) {
  return launch(blocks, 64, 0, narrow, x, h, b);
}
SSLK_EXPORT int run_warp_functions(int* out) { return launch(1, 32, 0, warp_functions, out); }
SSLK_EXPORT int run_record_order(int* next, int* order) {
  return launch(dim3(3, 2, 2), dim3(4, 2, 3), 0, record_order, next, order);
}
SSLK_EXPORT int last_error(bool clear) { return clear ? cudaGetLastError() : cudaPeekAtLastError(); }
