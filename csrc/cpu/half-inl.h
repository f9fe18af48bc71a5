// Vectors of features that memory holds as float, bfloat16 or half, and registers as float.
// Included by foreach_isa.h only, inside a namespace per instruction set.
//
// Conversions are exact upwards, and round to the nearest, ties to even, downwards. They are written in integer
// arithmetic, for not every instruction set here converts 16-bit numbers.

typedef uint16_t Short __attribute__((vector_size(LANES * sizeof(uint16_t))));

struct Float32 {
  typedef float Element;
  typedef Vec Packed;
  SSLK_INLINE Vec widen(Vec v) { return v; }
  SSLK_INLINE Vec narrow(Vec v) { return v; }
};

// The upper half of a float.
struct BFloat16 {
  typedef uint16_t Element;
  typedef Short Packed;
  SSLK_INLINE Vec widen(Short s) { return (Vec)(__builtin_convertvector(s, Bits) << 16); }
  SSLK_INLINE Short narrow(Vec v) {
    Bits bits = (Bits)v;
    bits = v == v ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : Bits{} + 0x7fc0;
    return __builtin_convertvector(bits, Short);
  }
};

// 5 bits of exponent with bias 15, 10 of mantissa.
struct Float16 {
  typedef uint16_t Element;
  typedef Short Packed;
  SSLK_INLINE Vec widen(Short s) {
    const Bits half = __builtin_convertvector(s, Bits), magnitude = half & 0x7fff;
    // As the bits of a float its exponent is 112 too low, for subnormal numbers too.
    const Bits finite = (Bits)((Vec)(magnitude << 13) * 0x1p112f), special = (magnitude << 13) | 0x7f800000;
    return (Vec)((magnitude >= 0x7c00 ? special : finite) | (half & 0x8000) << 16);
  }
  SSLK_INLINE Short narrow(Vec v) {
    const Bits sign = (Bits)v & 0x80000000, bits = (Bits)v ^ sign;
    const Vec magnitude = (Vec)bits;
    // Normal numbers: the exponent lowered by 112, the mantissa rounded; a carry moves on to the exponent.
    Bits half = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    // Below 2^-14: 0.5 has the spacing of subnormal halves, 2^-24, and adding it rounds to that.
    half = magnitude < 0x1p-14f ? (Bits)(magnitude + 0.5f) - 0x3f000000 : half;
    half = magnitude >= 65520.f ? Bits{} + 0x7c00 : half;
    half = magnitude == magnitude ? half : Bits{} + 0x7e00;
    return __builtin_convertvector(half | sign >> 16, Short);
  }
};

template <typename Type>
SSLK_INLINE Vec load_features(const typename Type::Element* p, int count) {
  typename Type::Packed packed = {};
  std::memcpy(&packed, p, count * sizeof *p);
  return Type::widen(packed);
}

template <typename Type>
SSLK_INLINE void store_features(typename Type::Element* p, Vec v, int count) {
  typename Type::Packed packed = Type::narrow(v);
  std::memcpy(p, &packed, count * sizeof *p);
}

// Calls body(col, LANES) for whole vectors, and once with what is left.
template <typename Body>
SSLK_INLINE void for_each_vector(int64_t width, Body body) {
  int64_t col = 0;
  for (; col + LANES <= width; col += LANES) body(col, LANES);
  if (col < width) body(col, int(width - col));
}

// The sum of body(col, count) over a row. The numbers of a vector behind the first `count` count too: they must be 0.
template <typename Body>
SSLK_INLINE double sum_of_row(int64_t width, Body body) {
  double total = 0;
  for (int64_t first = 0; first < width; first += 64 * LANES) {  // fp32 sums stay short
    const int64_t cols = width - first < 64 * LANES ? width - first : 64 * LANES;
    Vec part = {};
    for_each_vector(cols, [&](int64_t col, int count) __attribute__((always_inline)) {
      part += body(first + col, count);
    });
    total += sum(part);
  }
  return total;
}

// The norm of a row of such vectors.
template <typename Body>
SSLK_INLINE float norm_of_row(int64_t width, Body body) {
  double squares = sum_of_row(width, [&](int64_t col, int count) __attribute__((always_inline)) {
    const Vec v = body(col, count);
    return v * v;
  });
  if (!(squares > 1e-30 && squares < 1e38)) {  // what fp32 cannot hold
    squares = 0;
    for (int64_t col = 0; col < width; ++col) {
      const double v = body(col, 1)[0];
      squares += v * v;
    }
  }
  return float(std::sqrt(squares));
}

// Calls body with a value of the type that `type` names.
template <typename Body>
SSLK_INLINE void with_type(FeatureType type, Body body) {
  switch (type) {
    case FeatureType::kFloat32:
      return body(Float32{});
    case FeatureType::kBFloat16:
      return body(BFloat16{});
    case FeatureType::kFloat16:
      return body(Float16{});
  }
}
