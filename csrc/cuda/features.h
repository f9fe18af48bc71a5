// Features that memory holds as float, bfloat16 or half and registers as float, several to an access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../cpu/half.h"

namespace sslk {

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T element[N];
};

// Elements of two types to an access of at most 16 bytes.
template <typename A, typename B>
constexpr int kVector = 16 / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

template <int N, typename T>
__device__ Vector<T, N> load(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}

template <int N, typename T>
__device__ void store(T* p, const Vector<T, N>& v) {
  *reinterpret_cast<Vector<T, N>*>(p) = v;
}

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

// To the nearest, ties to even.
template <typename To>
__device__ To narrow(float x) {
  if constexpr (std::is_same<To, __nv_bfloat16>::value) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same<To, __half>::value) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// Equal types keep every bit.
template <typename To, typename From>
__device__ To convert(From x) {
  if constexpr (std::is_same<To, From>::value) {
    return x;
  } else {
    return narrow<To>(widen(x));
  }
}

// By how many elements an address is past a whole vector.
template <int N, typename T>
__device__ int misalignment(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % N);
}

template <int N>
using Width = std::integral_constant<int, N>;

// Shares out `size` elements among threads: body(Width<N>, at) for whole vectors, body(Width<1>, at) for each element
// before and after them. The first element is `past` a whole vector; where that is negative there are no vectors.
// (An index of 64 bits keeps the compiler from storing vectors whole.)
template <int N, typename Body>
__device__ void for_each_vector(int size, int past, int thread, int threads, Body body) {
  const int before = past > 0 ? N - past : 0;
  const int vectors = past < 0 || size < before ? 0 : (size - before) / N;
#pragma unroll 1
  for (int v = thread; v < vectors; v += threads) body(Width<N>(), before + v * N);
  const int rest = size - vectors * N;
#pragma unroll 1
  for (int i = thread; i < rest; i += threads) body(Width<1>(), i < before ? i : i + vectors * N);
}

// Calls body with a null pointer to the type.
template <typename Body>
__device__ __host__ void with_type(FeatureType type, Body body) {
  switch (type) {
    case FeatureType::kFloat32:
      return body(static_cast<float*>(nullptr));
    case FeatureType::kBFloat16:
      return body(static_cast<__nv_bfloat16*>(nullptr));
    case FeatureType::kFloat16:
      return body(static_cast<__half*>(nullptr));
  }
}

}  // namespace sslk
