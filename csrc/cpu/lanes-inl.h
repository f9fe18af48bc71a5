// What the kernels on tiles of a softmax share: vectors that are partly filled, and running sums of exponentials.
// Included by the kernels of softmax and row_softmax.

#define SSLK_LAMBDA __attribute__((always_inline))

constexpr float kNothing = -__builtin_inff();

SSLK_INLINE Mask only_lane(int64_t lane) {
  return lane_index() == (Mask{} + (lane >= 0 && lane < LANES ? int32_t(lane) : -1));
}

template <typename V, typename T>
SSLK_INLINE V load_first(const T* p, int count) {
  if (count == LANES) return load<V>(p);
  T values[LANES] = {};
  std::memcpy(values, p, count * sizeof(T));
  return load<V>(values);
}

SSLK_INLINE void store_first(float* p, Vec v, int count) {
  if (count == LANES) return store(p, v);
  std::memcpy(p, &v, count * sizeof(float));
}

SSLK_INLINE float largest(Vec v) {
  float top = v[0];
  for (int k = 1; k < LANES; ++k) top = v[k] > top ? v[k] : top;
  return top;
}

SSLK_INLINE float exp_scalar(float x) { return exp_nonpositive(broadcast(x))[0]; }

// exp(x), and 0 where it is below 2e-35: no subnormal number, which is slow, comes of a product with a weight.
SSLK_INLINE Vec probability(Vec x) { return x < -80 ? broadcast(0) : exp_nonpositive(x); }

// Adds `sum` of exponentials that refer to `top` to the running pair (maximum, sum).
SSLK_INLINE void merge(double* stats, double top, double sum, double scale) {
  if (top > stats[0]) {
    stats[1] = (stats[1] == 0 ? 0 : stats[1] * std::exp(scale * (stats[0] - top))) + sum;
    stats[0] = top;
  } else {
    stats[1] += sum == 0 ? 0 : sum * std::exp(scale * (top - stats[0]));
  }
}
