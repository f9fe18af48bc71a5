// The softmax of a row of logits, less a centre, times a scale, in one sweep over memory.
// Included by the kernels of dino and sinkhorn.
//
// A row is cut into blocks that stay in the first-level cache between the search for their maximum and the
// exponentials, which are taken against that maximum of their own; the factor between it and the maximum of the row is
// left to whoever reads them. A difference with a maximum comes before the scale, so that large logits keep their
// digits.

constexpr float kInfinity = __builtin_inff();

constexpr int64_t kBlock = 128 * LANES;  // sums within it are in fp32, beyond in double

SSLK_INLINE int64_t blocks_of(int64_t width) { return (width + kBlock - 1) / kBlock; }

// Calls body(block, first column, columns).
template <typename Body>
SSLK_INLINE void for_each_block(int64_t width, Body body) {
  for (int64_t first = 0, block = 0; first < width; first += kBlock, ++block) {
    body(block, first, width - first < kBlock ? width - first : kBlock);
  }
}

template <typename Type>
struct Logits {
  const typename Type::Element* row;
  const float* center;  // or null
};

template <typename Type>
SSLK_INLINE Vec load_logits(const Logits<Type>& logits, int64_t col, int count) {
  Vec y = load_features<Type>(logits.row + col, count);
  return logits.center ? y - load_features<Float32>(logits.center + col, count) : y;
}

// The largest logit of a block; NaNs are passed over, and show in the exponentials.
template <typename Type>
SSLK_INLINE float block_maximum(const Logits<Type>& logits, int64_t first, int64_t cols) {
  constexpr int kChains = 4;  // comparisons in flight
  Vec top[kChains];
  for (Vec& t : top) t = broadcast(-kInfinity);
  int64_t col = 0;
  for (; col + kChains * LANES <= cols; col += kChains * LANES) {
    for (int chain = 0; chain < kChains; ++chain) {
      Vec y = load_logits(logits, first + col + chain * LANES, LANES);
      top[chain] = y > top[chain] ? y : top[chain];
    }
  }
  for_each_vector(cols - col, [&](int64_t at, int count) __attribute__((always_inline)) {
    Vec y = load_logits(logits, first + col + at, count);
    top[0] = ((lane_index() < count) & (y > top[0])) ? y : top[0];
  });
  Vec most = top[0];
  for (int chain = 1; chain < kChains; ++chain) most = top[chain] > most ? top[chain] : most;
  float maximum = -kInfinity;
  for (int k = 0; k < LANES; ++k) maximum = most[k] > maximum ? most[k] : maximum;
  return maximum;
}

// exp(z) for z <= 0, and 0 below e^-64: what is divided by a sum later would be subnormal, which is slow.
SSLK_INLINE Vec exp_or_zero(Vec z) {
  Vec e = exp_unclamped(z);
  return z < -64 ? broadcast(0) : e;
}

SSLK_INLINE Vec lanes_below(int count, Vec v) { return count == LANES ? v : lane_index() < count ? v : broadcast(0); }

// Weights q of the columns, and their sum over each block.
struct Target {
  const float* q;
  const float* masses;
  double mass;
};

struct Peak {
  float shift;      // the maximum of the row; 0 where that is -infinity, as nothing is subtracted from it then
  double total;     // sum of exp(scale (y - shift))
  double weighted;  // sum of q scale (y - shift)
};

// What exponentials that were taken against `shift` of their block are to be multiplied by.
SSLK_INLINE double factor_from(const Peak& peak, float shift, float scale) {
  return shift == peak.shift ? 1 : std::exp((double(shift) - peak.shift) * scale);
}

// With kWrite the exponentials go to `out` and the shift of each block to `shifts`; with kWeigh `target` is weighed.
template <bool kWrite, bool kWeigh, typename Type>
SSLK_INLINE Peak exponentials(const Logits<Type>& logits, int64_t width, float scale, float* out, float* shifts,
                              const Target& target) {
  Peak peak = {};
  double mass = 0;
  const Vec factor = broadcast(scale);
  for_each_block(width, [&](int64_t block, int64_t first, int64_t cols) __attribute__((always_inline)) {
    const float maximum = block_maximum(logits, first, cols), shift = maximum == -kInfinity ? peak.shift : maximum;
    const Vec top = broadcast(shift);
    Vec totals = {}, weighted = {};
    for_each_vector(cols, [&](int64_t at, int count) __attribute__((always_inline)) {
      const int64_t col = first + at;
      __builtin_prefetch(logits.row + col + kBlock);  // the search for the next maximum does nothing but read
      Vec z = (load_logits(logits, col, count) - top) * factor, e = exp_or_zero(z);
      totals += lanes_below(count, e);
      if (kWeigh) weighted += lanes_below(count, load_features<Float32>(target.q + col, count) * z);
      if (kWrite) store_features<Float32>(out + col, e, count);
    });
    if (kWrite) shifts[block] = maximum;  // exponentials of -infinity are 0 whatever they are multiplied by, but infinity
    const Peak before = peak;
    peak.shift = before.total == 0 || shift > before.shift ? shift : before.shift;
    peak.total = sum(totals) * factor_from(peak, shift, scale);
    if (before.total != 0) peak.total += before.total * factor_from(peak, before.shift, scale);
    if (kWeigh) {
      peak.weighted += mass * (double(before.shift) - peak.shift) * scale;
      peak.weighted += sum(weighted) + target.masses[block] * (double(shift) - peak.shift) * scale;
      mass += target.masses[block];
    }
  });
  return peak;
}
