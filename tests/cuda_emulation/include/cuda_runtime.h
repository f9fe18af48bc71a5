// Stands in for CUDA's header of this name, so that g++ compiles CUDA sources for the CPU: the part of CUDA that the
// project's kernels use, and nothing that would let a kernel do here what a GPU refuses. What happens at run time is in
// emulator.cpp.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#include <math.h>  // sqrtf and its like without std::, as in CUDA

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#ifndef __shared__  // emulation.py leaves the word to its own pass; by itself this is enough to check the syntax
#define __shared__ static
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

#define SSLK_VECTOR_2(name, T, bytes)              \
  struct __align__(bytes) name {                   \
    T x, y;                                        \
  };                                               \
  inline name make_##name(T x, T y) { return {x, y}; }
#define SSLK_VECTOR_4(name, T, bytes)              \
  struct __align__(bytes) name {                   \
    T x, y, z, w;                                  \
  };                                               \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
SSLK_VECTOR_2(ushort2, unsigned short, 4)
SSLK_VECTOR_4(ushort4, unsigned short, 8)
SSLK_VECTOR_2(int2, int, 8)
SSLK_VECTOR_4(int4, int, 16)
SSLK_VECTOR_2(uint2, unsigned, 8)
SSLK_VECTOR_4(uint4, unsigned, 16)
SSLK_VECTOR_2(float2, float, 8)
SSLK_VECTOR_4(float4, float, 16)
SSLK_VECTOR_2(double2, double, 16)
SSLK_VECTOR_2(longlong2, long long, 16)
SSLK_VECTOR_2(ulonglong2, unsigned long long, 16)
#undef SSLK_VECTOR_2
#undef SSLK_VECTOR_4

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

using cudaStream_t = struct CUstream_st*;

struct cudaLaunchAttribute;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
// For an error that a launch returned, what went wrong: the kernel, the block, the thread.
const char* cudaGetErrorString(cudaError_t error);

namespace cuda_emulation {

extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

struct Site {
  const char* file;
  int line;
};

void sync_threads(Site site);
void sync_warp(unsigned mask, Site site);
// The bits that the source lane gave, or an error where it takes no part.
uint64_t shuffle(const char* name, unsigned mask, uint64_t bits, int source, Site site);
unsigned ballot(const char* name, unsigned mask, bool predicate, Site site);
int lane();

// Called where a kernel declares a shared variable: the first thread of a block that comes there fills it with NaN.
void declare_shared(void* variable, size_t bytes, const char* name);
void* dynamic_shared();

// What `extern __shared__ T name[]` is bound to.
struct DynamicShared {
  template <typename T>
  operator T&() const {
    return *static_cast<T*>(dynamic_shared());
  }
};

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, size_t parameter_bytes,
                   const std::function<void()>& run_thread);

template <typename T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves 1, 2, 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Lanes outside the segment give their own value back, as in CUDA.
template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source, bool inside, Site site) {
  return from_bits<T>(shuffle(name, mask, to_bits(value), inside ? source : lane(), site));
}

// Parameters live in constant memory: copying them to a thread's own is no access that could race.
template <typename... Parameters, size_t... I>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(Parameters...), const std::tuple<Parameters...>& values,
                                                 std::index_sequence<I...>) {
  kernel(std::get<I>(values)...);
}

}  // namespace cuda_emulation

// References to const: a kernel that writes to one does not compile, here as there.
static const uint3 &threadIdx = cuda_emulation::thread_index, &blockIdx = cuda_emulation::block_index;
static const dim3 &blockDim = cuda_emulation::block_size, &gridDim = cuda_emulation::grid_size;
constexpr int warpSize = 32;

#define SSLK_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SSLK_SITE) { cuda_emulation::sync_threads({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SSLK_SITE) { cuda_emulation::sync_warp(mask, {file, line}); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, SSLK_SITE) {
  const int first = cuda_emulation::lane() / width * width;
  return cuda_emulation::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), true, {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, SSLK_SITE) {
  const int lane = cuda_emulation::lane(), source = lane ^ lane_mask;
  return cuda_emulation::shuffle("__shfl_xor_sync", mask, value, source, source / width <= lane / width, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SSLK_SITE) {
  const int lane = cuda_emulation::lane(), source = lane + int(delta);
  return cuda_emulation::shuffle("__shfl_down_sync", mask, value, source, lane % width + int(delta) < width,
                                 {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SSLK_SITE) {
  const int lane = cuda_emulation::lane(), source = lane - int(delta);
  return cuda_emulation::shuffle("__shfl_up_sync", mask, value, source, lane % width >= int(delta), {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SSLK_SITE) {
  return cuda_emulation::ballot("__ballot_sync", mask, predicate != 0, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, SSLK_SITE) {
  return cuda_emulation::ballot("__any_sync", mask, predicate != 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SSLK_SITE) {
  return cuda_emulation::ballot("__all_sync", mask, predicate == 0, {file, line}) == 0;
}
#undef SSLK_SITE

int atomicAdd(int* address, int value);
unsigned atomicAdd(unsigned* address, unsigned value);
unsigned long long atomicAdd(unsigned long long* address, unsigned long long value);
float atomicAdd(float* address, float value);
void __threadfence();

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline int __float_as_int(float x) { return cuda_emulation::from_bits<int>(cuda_emulation::to_bits(x)); }
inline unsigned __float_as_uint(float x) { return cuda_emulation::from_bits<unsigned>(cuda_emulation::to_bits(x)); }
inline float __int_as_float(int x) { return cuda_emulation::from_bits<float>(cuda_emulation::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return cuda_emulation::from_bits<float>(cuda_emulation::to_bits(x)); }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "parameters are copied to the GPU as bytes");
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  size_t bytes = 0;
  ((bytes = (bytes + alignof(Parameters) - 1) / alignof(Parameters) * alignof(Parameters) + sizeof(Parameters)), ...);
  return cuda_emulation::launch(*config, reinterpret_cast<const void*>(kernel), bytes, [&] {
    cuda_emulation::call(kernel, values, std::index_sequence_for<Parameters...>());
  });
}
