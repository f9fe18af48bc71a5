// Log-sum-exp over columns, online over groups of rows that stay in registers; softmax over rows, whose exponentials
// stay in the second-level cache until the sum of the row is known. One exponential to an element (9/8 over columns).

#include "logits-inl.h"

template <typename Type>
SSLK_INLINE Logits<Type> row_of(const Sinkhorn& job, int64_t i) {
  return {static_cast<const typename Type::Element*>(job.logits) + i * job.stride, job.center};
}

template <typename Type>
static void column_lse(const Sinkhorn& job, int64_t begin, int64_t end, float* maxima, float* totals, bool more) {
  constexpr int kRows = 8;
  const Vec scale = broadcast(job.scale);
  for (int64_t i = 0; i < job.rows; i += kRows, more = true) {
    const int rows = job.rows - i < kRows ? int(job.rows - i) : kRows;
    for_each_vector(end - begin, [&](int64_t at, int count) __attribute__((always_inline)) {
      const int64_t col = begin + at;
      Vec y[kRows], before = more ? load_features<Float32>(maxima + col, count) : broadcast(-kInfinity), top = before;
      for (int r = 0; r < rows; ++r) {
        y[r] = load_features<Type>(row_of<Type>(job, i + r).row + col, count);
        top = y[r] > top || y[r] != y[r] ? y[r] : top;
      }
      Vec total = {};
      if (more) total = load_features<Float32>(totals + col, count) * exp_or_zero((before - top) * scale);
      for (int r = 0; r < rows; ++r) total += exp_or_zero((y[r] - top) * scale);
      store_features<Float32>(maxima + col, top, count);
      store_features<Float32>(totals + col, total, count);
    });
  }
}

// Writes the softmax of row i.
template <typename Type>
SSLK_INLINE void softmax_row(const Sinkhorn& job, int64_t i, float* out, float* shifts) {
  const Peak peak = exponentials<true, false>(row_of<Type>(job, i), job.width, job.scale, out, shifts, {});
  for_each_block(job.width, [&](int64_t block, int64_t first, int64_t cols) __attribute__((always_inline)) {
    const Vec factor = broadcast(float(factor_from(peak, shifts[block], job.scale) / peak.total));
    for_each_vector(cols, [&](int64_t at, int count) __attribute__((always_inline)) {
      float* p = out + first + at;
      store_features<Float32>(p, load_features<Float32>(p, count) * factor, count);
    });
  });
}

template <typename Type>
static void column_sums(const Sinkhorn& job, int64_t begin, int64_t end, float* scratch, float* sums) {
  constexpr int kRows = 2;  // added to the sums at a time
  float* shifts = scratch + kRows * job.width;
  for (int64_t i = begin; i < end; i += kRows) {
    const int rows = end - i < kRows ? int(end - i) : kRows;
    for (int r = 0; r < rows; ++r) softmax_row<Type>(job, i + r, scratch + r * job.width, shifts);
    for_each_vector(job.width, [&](int64_t col, int count) __attribute__((always_inline)) {
      Vec part = load_features<Float32>(scratch + col, count);
      for (int r = 1; r < rows; ++r) part += load_features<Float32>(scratch + r * job.width + col, count);
      store_features<Float32>(sums + col, load_features<Float32>(sums + col, count) + part, count);
    });
  }
}

template <typename Type>
static void softmax_rows(const Sinkhorn& job, int64_t begin, int64_t end, float* scratch, float* out) {
  for (int64_t i = begin; i < end; ++i) softmax_row<Type>(job, i, out + i * job.width, scratch);
}

#define SSLK_BY_TYPE(function, ...)            \
  switch (job.type) {                          \
    case FeatureType::kFloat32:                \
      return function<Float32>(__VA_ARGS__);   \
    case FeatureType::kBFloat16:               \
      return function<BFloat16>(__VA_ARGS__);  \
    case FeatureType::kFloat16:                \
      return function<Float16>(__VA_ARGS__);   \
  }

static void sinkhorn_column_lse(const Sinkhorn& job, int64_t begin, int64_t end, float* maxima, float* totals,
                                bool more) {
  SSLK_BY_TYPE(column_lse, job, begin, end, maxima, totals, more)
}

static void sinkhorn_column_sums(const Sinkhorn& job, int64_t begin, int64_t end, float* scratch, float* sums) {
  SSLK_BY_TYPE(column_sums, job, begin, end, scratch, sums)
}

static void centered_softmax(const Sinkhorn& job, int64_t begin, int64_t end, float* scratch, float* out) {
  SSLK_BY_TYPE(softmax_rows, job, begin, end, scratch, out)
}

#undef SSLK_BY_TYPE
