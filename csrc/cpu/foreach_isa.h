// Compiles the file named by SSLK_KERNEL once per instruction set, each time in a namespace of its own
// (sslk::baseline, sslk::avx2, sslk::avx512) with LANES floats to a vector.
//
// The kernel file may include nothing: a standard header's inline functions compiled for AVX-512 here could be the
// copies that the linker keeps for the whole library. What kernels need is included below, before the first target.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"
#include "isa.h"

#define SSLK_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SSLK_BEGIN_TARGET(isa) \
  SSLK_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define SSLK_END_TARGET SSLK_PRAGMA(clang attribute pop)
#else
#define SSLK_BEGIN_TARGET(isa) SSLK_PRAGMA(GCC push_options) SSLK_PRAGMA(GCC target(isa))
#define SSLK_END_TARGET SSLK_PRAGMA(GCC pop_options)
#endif

#define LANES 4
namespace sslk::baseline {
#include "vec-inl.h"
#include "half-inl.h"
#include SSLK_KERNEL
}  // namespace sslk::baseline
#undef LANES

#if SSLK_X86

SSLK_BEGIN_TARGET("avx2,fma")
#define LANES 8
namespace sslk::avx2 {
#include "vec-inl.h"
#include "half-inl.h"
#include SSLK_KERNEL
}  // namespace sslk::avx2
#undef LANES
SSLK_END_TARGET

SSLK_BEGIN_TARGET("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")
#define LANES 16
namespace sslk::avx512 {
#include "vec-inl.h"
#include "half-inl.h"
#include SSLK_KERNEL
}  // namespace sslk::avx512
#undef LANES
SSLK_END_TARGET

#endif

// Calls `function` of the namespace that `isa` names.
#if SSLK_X86
#define SSLK_DISPATCH(isa, function, ...)      \
  switch (isa) {                               \
    case ::sslk::Isa::kAvx512:                 \
      return ::sslk::avx512::function(__VA_ARGS__);   \
    case ::sslk::Isa::kAvx2:                   \
      return ::sslk::avx2::function(__VA_ARGS__);     \
    case ::sslk::Isa::kBaseline:               \
      return ::sslk::baseline::function(__VA_ARGS__); \
  }
#else
#define SSLK_DISPATCH(isa, function, ...) \
  (void)(isa);                            \
  return ::sslk::baseline::function(__VA_ARGS__);
#endif
