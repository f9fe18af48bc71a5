// Online softmax over a tile of raw similarities r = q_i . k_j, z = scale r, in two sweeps of a row that stays in L1.
// With u = r, or -r where the scale is negative, and t = |scale|:
//
//   m' = max(m, max_j u_j)                       the running maximum
//   e_j = exp(t (u_j - m')),   s' = s exp(t (m - m')) + sum_j e_j
//
// and whatever was weighed by exponentials of earlier tiles is multiplied by exp(t (m - m')) too. The maximum is one of
// similarities, and their difference comes before the product, so that the largest has the exponential 1 however large
// z is: t u_j less a rounded t m' would be what the rounding left. One exponential to an element; the sum is 1 at
// least, so that an exponential that bottoms out at 1.2e-38 changes nothing.
//
// As in logsumexp, nothing is subtracted from a row whose maximum is infinite: it sums to +infinity, or to a finite
// number beside the maximum -infinity. A NaN does not enter the maximum and shows in the sum.

// Columns after which the fp32 sum of a row goes to double: a row may be millions of columns long.
constexpr int64_t kColumnsPerSum = 64 * LANES;

constexpr float kInfinity = __builtin_inff();

// The largest number of a row, or of its negatives.
template <bool kNegative>
SSLK_INLINE float row_maximum(const float* row, int64_t cols) {
  constexpr int kChains = 4;  // comparisons in flight
  Vec top[kChains];
  for (Vec& t : top) t = broadcast(-kInfinity);
  int64_t col = 0;
  for (; col + kChains * LANES <= cols; col += kChains * LANES) {
    for (int chain = 0; chain < kChains; ++chain) {
      const Vec r = load<Vec>(row + col + chain * LANES), u = kNegative ? -r : r;
      top[chain] = u > top[chain] ? u : top[chain];
    }
  }
  float maximum = -kInfinity;
  for (const Vec& t : top) {
    for (int k = 0; k < LANES; ++k) maximum = t[k] > maximum ? t[k] : maximum;
  }
  for (; col < cols; ++col) {
    const float u = kNegative ? -row[col] : row[col];
    maximum = u > maximum ? u : maximum;
  }
  return maximum;
}

// exp(scale (raw - shift)), where the difference is positive only beside an infinite maximum: then any large number will
// do, for the infinity is in the sum.
SSLK_INLINE Vec exp_from(Vec raw, Vec scale, Vec shift) {
  Vec x = (raw - shift) * scale;
  Vec e = exp_nonpositive(x);
  return x > 0 ? x : e;
}

template <bool kWrite>
SSLK_INLINE double exp_row(float* row, int64_t cols, Vec scale, Vec shift) {
  double total = 0;
  Vec part = {};
  int64_t col = 0;
  for (; col + LANES <= cols; col += LANES) {
    Vec e = exp_from(load<Vec>(row + col), scale, shift);
    part += e;
    if (kWrite) store(row + col, e);
    if (col % kColumnsPerSum == kColumnsPerSum - LANES) {
      total += sum(part);
      part = Vec{};
    }
  }
  if (const int rest = int(cols - col)) {
    float buffer[LANES] = {};
    std::memcpy(buffer, row + col, rest * sizeof(float));
    Vec e = exp_from(load<Vec>(buffer), scale, shift);
    part += lane_index() < rest ? e : broadcast(0);
    if (kWrite) std::memcpy(row + col, &e, rest * sizeof(float));
  }
  return total + sum(part);
}

static void key_softmax_panel(const KeySoftmaxPanel& p, int64_t begin, int64_t end) {
  const Vec scale = broadcast(p.scale);
  const float sign = p.scale < 0 ? -1 : 1;
  const double magnitude = sign * p.scale;
  for (int64_t i = begin; i < end; ++i) {
    float* row = p.tile + i * p.row_stride;
    double* stats = p.stats + 2 * i;
    const double before = stats[0];
    const double here = p.scale < 0 ? row_maximum<true>(row, p.cols) : row_maximum<false>(row, p.cols);
    const double maximum = here > before ? here : before;
    const bool infinite = std::fabs(magnitude * maximum) == kInfinity;
    const Vec shift = broadcast(infinite ? 0 : sign * float(maximum));
    const double total = p.mean ? exp_row<true>(row, p.cols, scale, shift) : exp_row<false>(row, p.cols, scale, shift);
    double rescale = 1;
    if (before != maximum && !infinite) {  // 0 before the first tile, at a scale of 0 too
      rescale = before == -kInfinity ? 0 : std::exp(magnitude * (before - maximum));
    }
    stats[0] = maximum;
    stats[1] = stats[1] * rescale + total;
    if (p.mean && rescale != 1) {
      float* mean = p.mean + i * p.mean_stride;
      for (int64_t k = 0; k < p.width; ++k) mean[k] *= float(rescale);
    }
  }
}

// For a positive the difference comes before the product, too. An infinite similarity would pass for a perfect match,
// but for the last term of the loss.
template <typename Type>
SSLK_INLINE void info_nce_row(const KeySoftmaxRows& job, int64_t i, float* mean, double maximum, double log_total) {
  typedef typename Type::Element Element;
  const Element* query = static_cast<const Element*>(job.query) + i * job.query_stride;
  const Element* positive = static_cast<const Element*>(job.positive) + i * job.positive_stride;
  const double similarity = sum_of_row(job.width, [&](int64_t col, int count) __attribute__((always_inline)) {
    return load_features<Type>(query + col, count) * load_features<Type>(positive + col, count);
  });
  const double z = job.scale * similarity, top = std::fabs(job.scale) * maximum;
  const double difference = maximum - (job.scale < 0 ? -similarity : similarity);
  const double gap = (std::fabs(top) == kInfinity ? top - z : std::fabs(job.scale) * difference) + log_total;
  const double e = std::exp(-std::fabs(gap));
  const double loss = job.positive_is_key ? gap : (gap > 0 ? gap : 0) + std::log1p(e);
  const double slope = job.positive_is_key ? 1 : (gap > 0 ? 1 : e) / (1 + e);
  job.values[i] = loss + 0 * z;
  job.slopes[i] = float(slope * job.unit);
  if (!mean) return;
  for_each_vector(job.width, [&](int64_t col, int count) __attribute__((always_inline)) {
    const Vec v = load_features<Float32>(mean + col, count) - load_features<Type>(positive + col, count);
    store_features<Float32>(mean + col, v, count);
  });
}

template <typename Type>
static void key_softmax_rows_of(const KeySoftmaxRows& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const bool keys = job.stats[2 * i + 1] != 0;  // whether there are any
    const double maximum = keys ? job.stats[2 * i] : 0, total = job.stats[2 * i + 1], log_total = std::log(total);
    const double top = std::fabs(job.scale) * maximum;
    float* mean = job.mean ? job.mean + i * job.width : nullptr;
    if (mean && keys) {
      const float divisor = std::fabs(top) == kInfinity ? __builtin_nanf("") : float(total);  // infinite logits: no mean
      for (int64_t k = 0; k < job.width; ++k) mean[k] /= divisor;
    }
    if (job.slopes) {
      info_nce_row<Type>(job, i, mean, maximum, log_total);
    } else {
      job.values[i] = top + log_total;
    }
  }
}

template <typename Type>
static void key_softmax_gradient_of(const KeySoftmaxGradient& job, int64_t begin, int64_t end) {
  typedef typename Type::Element Element;
  for (int64_t i = begin; i < end; ++i) {
    const Element* query = static_cast<const Element*>(job.query) + i * job.query_stride;
    const float* pull = job.pull ? job.pull + i * job.width : nullptr;
    const double f = job.upstream[i * job.upstream_stride] * (job.slopes ? double(job.slopes[i]) : 1);
    const float factor = float(f * job.scale);
    if (job.by_query) {
      Element* out = static_cast<Element*>(job.by_query) + i * job.width;
      for_each_vector(job.width, [&](int64_t col, int count) __attribute__((always_inline)) {
        store_features<Type>(out + col, load_features<Float32>(pull + col, count) * factor, count);
      });
    }
    if (job.by_positive) {
      Element* out = static_cast<Element*>(job.by_positive) + i * job.width;
      for_each_vector(job.width, [&](int64_t col, int count) __attribute__((always_inline)) {
        store_features<Type>(out + col, load_features<Type>(query + col, count) * -factor, count);
      });
    }
    if (job.by_scale) {
      job.by_scale[i] = f * sum_of_row(job.width, [&](int64_t col, int count) __attribute__((always_inline)) {
        return load_features<Type>(query + col, count) * load_features<Float32>(pull + col, count);
      });
    }
  }
}

static void key_softmax_rows(const KeySoftmaxRows& job, int64_t begin, int64_t end) {
  with_type(job.type, [&](auto type) { key_softmax_rows_of<decltype(type)>(job, begin, end); });
}

static void key_softmax_gradient(const KeySoftmaxGradient& job, int64_t begin, int64_t end) {
  with_type(job.type, [&](auto type) { key_softmax_gradient_of<decltype(type)>(job, begin, end); });
}
