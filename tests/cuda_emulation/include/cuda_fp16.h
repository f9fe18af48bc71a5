// Stands in for CUDA's header of this name: half as a type that is stored, and its conversions.
#pragma once

#include "cuda_runtime.h"

struct __align__(2) __half {
  unsigned short bits;
};
using half = __half;

struct __align__(4) __half2 {
  __half x, y;
};
using half2 = __half2;

inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half h) {
  const unsigned sign = (h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
}

inline __half __float2half_rn(float x) {
  const unsigned magnitude = __float_as_uint(x) & 0x7fffffffu;
  const unsigned short sign = (unsigned short)(__float_as_uint(x) >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {(unsigned short)(sign | 0x7c00u)};  // 65520 rounds to infinity
  if (magnitude < 0x38800000u) {  // no normal half: a sum with 0.5 rounds to multiples of 2^-24
    return {(unsigned short)(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {(unsigned short)(sign | (magnitude + 0xfffu + (magnitude >> 13 & 1) - (112u << 23)) >> 13)};
}

inline __half __float2half(float x) { return __float2half_rn(x); }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
