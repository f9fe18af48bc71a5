// Vectors of LANES floats by GCC/Clang vector extensions, and the two transcendental functions the kernels use.
// Included by foreach_isa.h only, inside a namespace per instruction set.

#define SSLK_INLINE static inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Mask __attribute__((vector_size(LANES * sizeof(int32_t))));  // all bits set: true
typedef uint32_t Bits __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef int64_t Long __attribute__((vector_size(LANES * sizeof(int64_t))));

template <typename V, typename T>
SSLK_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

SSLK_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Stores past the caches to an address that is a multiple of the vector's size: memory that will not be read soon need
// not be fetched before it is written. fence() comes before another thread may read it.
SSLK_INLINE void stream(float* p, Vec v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<Vec*>(p));
#elif SSLK_X86 && LANES == 16
  __builtin_ia32_movntps512(p, v);
#elif SSLK_X86 && LANES == 8
  __builtin_ia32_movntps256(p, v);
#elif SSLK_X86
  __builtin_ia32_movntps(p, v);
#else
  store(p, v);
#endif
}

SSLK_INLINE void fence() {
#if SSLK_X86
  __builtin_ia32_sfence();
#endif
}

SSLK_INLINE Vec broadcast(float x) { return Vec{} + x; }

SSLK_INLINE Mask lane_index() {
  Mask v;
  for (int k = 0; k < LANES; ++k) v[k] = k;
  return v;
}

// max(v, floor) that lets a NaN in v through.
SSLK_INLINE Vec max_nan(Vec v, float floor) { return v < floor ? broadcast(floor) : v; }

// v, rounded: a product in it is not fused with a sum outside, which would keep digits that an equal term does not have.
SSLK_INLINE Vec rounded(Vec v) {
  __asm__ volatile("" : "+m"(v));
  return v;
}

SSLK_INLINE double sum(Vec v) {
  double s = 0;
  for (int k = 0; k < LANES; ++k) s += v[k];
  return s;
}

// exp(x) for -87.3 <= x <= 0, to 1.5 units in the last place; NaN for NaN; some number for any other x.
// x = n ln 2 + r with |r| <= ln(2)/2, then 2^n times a polynomial in r.
SSLK_INLINE Vec exp_unclamped(Vec x) {
  const float round = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  Vec shifted = x * 1.44269504f + round;
  Vec n = shifted - round;
  Vec r = x - n * 0.693359375f;  // ln 2 in two parts, the first exact when multiplied by n
  r = r + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  Bits power = ((Bits)shifted << 23) + 0x3f800000;  // the bits of 2^n; unsigned, since far out they wrap around
  return p * (Vec)power;                            // a product, so that a NaN in p stays one
}

// exp(x) for x <= 0; exp(-87.3) = 1.2e-38 below that; NaN for NaN.
SSLK_INLINE Vec exp_nonpositive(Vec x) { return exp_unclamped(max_nan(x, -87.3f)); }

// log(1 + e) for 0 <= e <= 1 to 2e-7 relative, tiny e included: e times the minimax polynomial of log1p(e)/e.
SSLK_INLINE Vec log1p_unit(Vec e) {
  Vec p = e * 0.005232690027f - 0.02950521992f;
  p = p * e + 0.07822591751f;
  p = p * e - 0.136632425f;
  p = p * e + 0.1910600499f;
  p = p * e - 0.2484298169f;
  p = p * e + 0.3331909673f;
  p = p * e - 0.4999949314f;
  p = p * e + 0.9999999699f;
  return p * e;
}
