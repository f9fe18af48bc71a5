// Two-sided softmax over a tile of raw similarities r = x_i . y_j, z = t r.
//
// Statistics. Rows and columns each need the maximum and the sum of exp(z - maximum), and one exponential serves both:
//   e_ij = exp(t (r_ij - a_i)), a_i the largest r of row i in the tile:     row i adds e_ij
//   column j adds e_ij w_i,  w_i = exp(t (a_i - c)), c the largest r of a chunk of rows
// A row's sum is at least 1. A column's may be small next to c, and then has lost digits; such columns, and their
// neighbours in the vector, are summed again from their own maximum. Taking the difference before multiplying by t is exact where
// it matters, close to the maximum; so maxima stay those of r, and t m + log s, which may be far larger than log s, is
// never made.
//
// Gradient. P = exp(t (r - m) - log s), once for the row and once for the column.

#include "lanes-inl.h"

// Below it a column is far from c: the rounding of t (a_i - c) would be in its sum, and in the end its terms underflow.
// A column that one row has to itself comes to 1 at most, and has to come to its own term to the last bit: in the
// gradient the two must cancel.
constexpr float kLeastColumnSum = 1;

struct Pairs {
  Mask positive, ignored;
};

// The pairs of a row from column `col` on; lanes from `count` on are ignored.
template <bool kIds>
SSLK_INLINE Pairs pairs_at(const SoftmaxTile& t, int64_t row, int64_t col, int count) {
  Pairs pairs;
  pairs.positive = only_lane(row + t.positive - col);
  pairs.ignored = (lane_index() >= (Mask{} + count)) | only_lane(row + t.excluded - col);
  if (kIds) {
    Mask same = __builtin_convertvector(load_first<Long>(t.col_ids + col, count) == t.row_ids[row], Mask);
    if (t.ignore_same_id) {
      pairs.ignored |= same & ~pairs.positive;
    } else {
      pairs.positive |= same;
    }
  }
  pairs.positive &= ~pairs.ignored;
  return pairs;
}

// Calls plain(col) for the full vectors of a row in which every pair counts as a negative, masked(col, count) for the
// others, in order, and flush() before fp32 sums grow long.
template <bool kIds, typename Plain, typename Masked, typename Flush>
SSLK_INLINE void for_each_vector(const SoftmaxTile& t, int64_t row, Plain plain, Masked masked, Flush flush) {
  const int64_t special[] = {row + t.positive, row + t.excluded};
  int64_t col = 0;
  for (; col + LANES <= t.cols; col += LANES) {
    const bool meets = (special[0] >= col && special[0] < col + LANES) || (special[1] >= col && special[1] < col + LANES);
    if (kIds || meets) {
      masked(col, LANES);
    } else {
      plain(col);
    }
    if (col % (64 * LANES) == 63 * LANES) flush();
  }
  if (col < t.cols) masked(col, int(t.cols - col));
  flush();
}

// The largest similarity of a row that counts; NaNs are left to the sum.
template <bool kIds>
SSLK_INLINE float row_maximum(const SoftmaxTile& t, int64_t row) {
  const float* raw = t.raw + row * t.row_stride;
  Vec top = broadcast(kNothing);
  for_each_vector<kIds>(
      t, row,
      [&](int64_t col) SSLK_LAMBDA {
        Vec r = load<Vec>(raw + col);
        top = r > top ? r : top;
      },
      [&](int64_t col, int count) SSLK_LAMBDA {
        Vec r = load_first<Vec>(raw + col, count);
        top = (r > top) & ~pairs_at<kIds>(t, row, col, count).ignored ? r : top;
      },
      []() SSLK_LAMBDA {});
  return largest(top);
}

template <bool kIds, bool kUniform, bool kColumns>
SSLK_INLINE void stats_row(SoftmaxStats& s, int64_t row, float top, float chunk_top, float* sums) {
  const SoftmaxTile& t = s.tile;
  const float* raw = t.raw + row * t.row_stride;
  double* stats = s.row_stats + row * s.width;
  const bool empty = top == kNothing;  // no pair counts, or only infinitely bad ones, or NaN
  const Vec reference = broadcast(empty ? 0 : top), scale = broadcast(t.scale);
  const Vec weight = broadcast(empty ? 0 : exp_scalar(t.scale * (top - chunk_top)));
  Vec exps = {}, positives = {}, positive_count = {}, all = {}, all_count = {};
  double exp_sum = 0;

  auto add = [&](Vec e, int64_t col, int count) SSLK_LAMBDA {
    exps += e;
    if (kColumns) store_first(sums + col, load_first<Vec>(sums + col, count) + e * weight, count);
  };
  for_each_vector<kIds || kUniform>(
      t, row, [&](int64_t col) SSLK_LAMBDA { add(exp_nonpositive((load<Vec>(raw + col) - reference) * scale), col, LANES); },
      [&](int64_t col, int count) SSLK_LAMBDA {
        const Vec r = load_first<Vec>(raw + col, count), zero = {}, one = broadcast(1);
        const Pairs pairs = pairs_at<kIds>(t, row, col, count);
        const Vec z = pairs.ignored ? zero : (r - reference) * scale;  // may be positive where ignored
        add(pairs.ignored ? zero : exp_nonpositive(z), col, count);
        const Vec positive = pairs.positive ? r : zero, is_positive = pairs.positive ? one : zero;
        const Vec kept = pairs.ignored ? zero : r, is_kept = pairs.ignored ? zero : one;
        positives += positive;
        positive_count += is_positive;
        if (kUniform) {
          all += kept;
          all_count += is_kept;
        }
        if (kColumns && (kIds || kUniform)) {
          const Vec added[] = {positive, is_positive, kept, is_kept};
          for (int plane = 0; plane < (kUniform ? 4 : 2); ++plane) {
            float* at = sums + (plane + 1) * t.cols + col;
            store_first(at, load_first<Vec>(at, count) + added[plane], count);
          }
        } else if (kColumns) {
          for (int k = 0; k < count; ++k) {
            if (!pairs.positive[k]) continue;  // a column has at most one positive here: no other row writes to it
            double* column = s.col_stats + (col + k) * s.width;
            column[2] += r[k];
            column[3] += 1;
          }
        }
      },
      [&]() SSLK_LAMBDA {
        exp_sum += sum(exps);
        stats[2] += sum(positives);
        stats[3] += sum(positive_count);
        if (kUniform) {
          stats[4] += sum(all);
          stats[5] += sum(all_count);
        }
        exps = positives = positive_count = all = all_count = Vec{};
      });
  if (!empty) {
    merge(stats, top, exp_sum, t.scale);
  } else if (exp_sum != exp_sum) {
    stats[1] = exp_sum;
  }
}

template <bool kIds, bool kUniform, bool kColumns>
static void stats_rows(SoftmaxStats& s, int64_t chunk_begin, int64_t chunk_end) {
  const int64_t rows = s.tile.rows;
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    const int64_t begin = chunk * s.kChunk, end = begin + s.kChunk < rows ? begin + s.kChunk : rows;
    float tops[SoftmaxStats::kChunk], chunk_top = kNothing;
    for (int64_t row = begin; row < end; ++row) {
      const float top = tops[row - begin] = row_maximum<kIds>(s.tile, row);
      chunk_top = top > chunk_top ? top : chunk_top;
    }
    if (kColumns) s.tops[chunk] = chunk_top;
    float* sums = kColumns ? s.sums.data() + chunk * s.planes * s.tile.cols : nullptr;
    for (int64_t row = begin; row < end; ++row) {
      stats_row<kIds, kUniform, kColumns>(s, row, tops[row - begin], chunk_top, sums);
    }
  }
}

static void softmax_stats_rows(SoftmaxStats& s, int64_t begin, int64_t end) {
  const bool ids = s.tile.row_ids, columns = s.col_stats;
  if (ids && s.uniform) return columns ? stats_rows<true, true, true>(s, begin, end) : stats_rows<true, true, false>(s, begin, end);
  if (ids) return columns ? stats_rows<true, false, true>(s, begin, end) : stats_rows<true, false, false>(s, begin, end);
  if (s.uniform) return columns ? stats_rows<false, true, true>(s, begin, end) : stats_rows<false, true, false>(s, begin, end);
  return columns ? stats_rows<false, false, true>(s, begin, end) : stats_rows<false, false, false>(s, begin, end);
}

// The columns [col, col + count) of the whole tile from their own maxima.
SSLK_INLINE void columns_again(const SoftmaxTile& t, int64_t col, int count, Vec& top, Vec& exps) {
  auto ignored = [&](int64_t row) SSLK_LAMBDA {
    return t.row_ids ? pairs_at<true>(t, row, col, count).ignored : pairs_at<false>(t, row, col, count).ignored;
  };
  top = broadcast(kNothing);
  for (int64_t row = 0; row < t.rows; ++row) {
    Vec r = load_first<Vec>(t.raw + row * t.row_stride + col, count);
    top = (r > top) & ~ignored(row) ? r : top;
  }
  exps = Vec{};
  const Vec reference = top == kNothing ? broadcast(0) : top;
  for (int64_t row = 0; row < t.rows; ++row) {
    Vec r = load_first<Vec>(t.raw + row * t.row_stride + col, count);
    const Mask skip = ignored(row);
    const Vec z = skip ? broadcast(0) : (r - reference) * t.scale;
    exps += skip ? broadcast(0) : exp_nonpositive(z);
  }
}

static void softmax_stats_columns(SoftmaxStats& s, int64_t col_begin, int64_t col_end) {
  const SoftmaxTile& t = s.tile;
  const int64_t chunks = s.chunks();
  float tile_top = kNothing;
  for (float top : s.tops) tile_top = top > tile_top ? top : tile_top;
  for (int64_t col = col_begin; col < col_end; col += LANES) {
    const int count = col_end - col < LANES ? int(col_end - col) : LANES;
    Vec planes[kUniformStats - 1] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* sums = s.sums.data() + chunk * s.planes * t.cols + col;
      const float factor = s.tops[chunk] == kNothing ? 1 : exp_scalar(t.scale * (s.tops[chunk] - tile_top));
      planes[0] += load_first<Vec>(sums, count) * factor;
      for (int64_t plane = 1; plane < s.planes; ++plane) planes[plane] += load_first<Vec>(sums + plane * t.cols, count);
    }
    Vec top = broadcast(tile_top);
    bool lost = false;
    for (int k = 0; k < count; ++k) lost |= planes[0][k] < kLeastColumnSum;
    if (lost) columns_again(t, col, count, top, planes[0]);
    for (int k = 0; k < count; ++k) {
      double* stats = s.col_stats + (col + k) * s.width;
      if (top[k] != kNothing) {
        merge(stats, top[k], planes[0][k], t.scale);
      } else if (planes[0][k] != planes[0][k]) {
        stats[1] = planes[0][k];
      }
      for (int64_t plane = 1; plane < s.planes; ++plane) stats[plane + 1] += planes[plane][k];
    }
  }
}

template <bool kIds, bool kUniform>
static void grad_rows(const SoftmaxGrad& g, int64_t begin, int64_t end) {
  const SoftmaxTile& t = g.tile;
  const Vec scale = broadcast(t.scale);
  for (int64_t row = begin; row < end; ++row) {
    float* raw = t.raw + row * t.row_stride;
    const Vec top = broadcast(g.row.top[row]), log_sum = broadcast(g.row.log_sum[row]);
    const Vec weight = broadcast(g.row.weight[row]);
    const Vec uniform = broadcast(kUniform ? g.row.uniform[row] : 0);
    Vec moment = {};

    auto grad = [&](Vec r, Mask ignored, int64_t col, int count) SSLK_LAMBDA {
      const Vec col_top = load_first<Vec>(g.col.top + col, count);
      const Vec col_log_sum = load_first<Vec>(g.col.log_sum + col, count);
      const Vec row_z = (r - top) * scale - log_sum, col_z = (r - col_top) * scale - col_log_sum, zero = {};
      Vec G = weight * probability(ignored ? zero : row_z);  // may be positive where ignored
      G += load_first<Vec>(g.col.weight + col, count) * probability(ignored ? zero : col_z);
      if (kUniform) G -= uniform + load_first<Vec>(g.col.uniform + col, count);
      return G;
    };
    for_each_vector<kIds>(
        t, row,
        [&](int64_t col) SSLK_LAMBDA {
          const Vec r = load<Vec>(raw + col), G = grad(r, Mask{}, col, LANES);
          moment += G * r;
          if (g.write) store(raw + col, G);
        },
        [&](int64_t col, int count) SSLK_LAMBDA {
          const Pairs pairs = pairs_at<kIds>(t, row, col, count);
          const Vec zero = {}, target = g.row.target[row] + load_first<Vec>(g.col.target + col, count);
          Vec r = load_first<Vec>(raw + col, count);
          r = pairs.ignored ? zero : r;
          Vec G = grad(r, pairs.ignored, col, count);
          G = pairs.positive ? G - target : G;
          G = pairs.ignored ? zero : G;
          moment += G * r;
          if (g.write) store_first(raw + col, G, count);
        },
        [&]() SSLK_LAMBDA {
          g.stats[row] += sum(moment);
          moment = Vec{};
        });
  }
}

static void softmax_grad(const SoftmaxGrad& g, int64_t begin, int64_t end) {
  if (g.tile.row_ids) return g.row.uniform ? grad_rows<true, true>(g, begin, end) : grad_rows<true, false>(g, begin, end);
  return g.row.uniform ? grad_rows<false, true>(g, begin, end) : grad_rows<false, false>(g, begin, end);
}
