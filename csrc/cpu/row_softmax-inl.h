// Softmax over the rows of a tile of similarities.
//
// A row is read twice: for its maximum, and for the exponentials against it; the second time it comes from the first
// cache. What pairs are is looked at pair by pair only where ids, a guide or smoothed targets ask for it; else a row has
// one target, and the vector that holds it, and the one that ends the row, are the only ones that are not plain.
//
// The gradient. P = exp(unit (v - top) - log_sum), so that a target that has all of the probability cancels to 0.

#include "lanes-inl.h"

// Pairs of a row from column `col` on; lanes from `count` on are left out.
struct Part {
  Mask positive, ignored;
  Vec s, v;  // 0 where left out
};

template <bool kLogits>
SSLK_INLINE Vec similarity(const RowTile& t, int64_t row, int64_t col, int count) {
  const Vec raw = load_first<Vec>(t.raw + row * t.row_stride + col, count);
  if (!kLogits || !t.row_factor) return raw;
  return raw * t.row_factor[row] * load_first<Vec>(t.col_factor + col, count);
}

template <bool kLogits>
SSLK_INLINE Vec value(const RowTile& t, Vec s, Vec scale, int64_t col, int count) {
  if (!kLogits) return s;
  return t.bias ? s * scale + load_first<Vec>(t.bias + col, count) : s * scale;
}

template <bool kLogits>
SSLK_INLINE Part part_at(const RowTile& t, int64_t row, int64_t col, int count) {
  Part p;
  Mask same = {};
  p.positive = only_lane(t.target[row] - col);
  p.ignored = lane_index() >= (Mask{} + count);
  if (t.row_ids) {
    same = __builtin_convertvector(load_first<Long>(t.col_ids + col, count) == t.row_ids[row], Mask);
    if (t.same_id == SameId::kIgnored) p.ignored |= same & ~p.positive;
    if (t.same_id == SameId::kPositive) p.positive |= same;
  }
  if (t.guided) {
    const Vec raw = load_first<Vec>(t.raw + row * t.row_stride + col, count);
    p.ignored |= (raw < kLeastSimilarity) & (raw != kNothing);
  }
  if (kLogits && t.bias) p.ignored |= load_first<Vec>(t.bias + col, count) == kNothing;
  p.positive &= ~p.ignored;
  p.s = p.ignored ? broadcast(0) : similarity<kLogits>(t, row, col, count);
  const Vec scale = p.positive ? broadcast(t.scale) : same ? broadcast(t.same_scale) : broadcast(t.other_scale);
  p.v = p.ignored ? broadcast(0) : value<kLogits>(t, p.s, scale, col, count);
  return p;
}

// Calls plain(col) for the full vectors of a row in which every pair counts as a negative, masked(col, count) for the
// others, in order, and flush() before fp32 sums grow long.
template <bool kMasks, typename Plain, typename Masked, typename Flush>
SSLK_INLINE void for_each_part(const RowTile& t, int64_t row, Plain plain, Masked masked, Flush flush) {
  const int64_t target = t.target[row];
  int64_t col = 0;
  for (; col + LANES <= t.cols; col += LANES) {
    if (kMasks || (target >= col && target < col + LANES)) {
      masked(col, LANES);
    } else {
      plain(col);
    }
    if (col % (64 * LANES) == 63 * LANES) flush();
  }
  if (col < t.cols) masked(col, int(t.cols - col));
  flush();
}

// The largest v of a row that counts; NaNs are left to the sum.
template <bool kMasks, bool kLogits>
SSLK_INLINE float row_maximum(const RowTile& t, int64_t row) {
  Vec top = broadcast(kNothing);
  const Vec scale = broadcast(t.other_scale);
  for_each_part<kMasks>(
      t, row,
      [&](int64_t col) SSLK_LAMBDA {
        const Vec v = value<kLogits>(t, similarity<kLogits>(t, row, col, LANES), scale, col, LANES);
        top = v > top ? v : top;
      },
      [&](int64_t col, int count) SSLK_LAMBDA {
        const Part p = part_at<kLogits>(t, row, col, count);
        top = (p.v > top) & ~p.ignored ? p.v : top;
      },
      []() SSLK_LAMBDA {});
  return largest(top);
}

template <bool kMasks, bool kLogits>
static void stats_rows(const RowStats& job, int64_t begin, int64_t end) {
  const RowTile& t = job.tile;
  const bool of_all = job.width == kAllRowStats;
  const Vec unit = broadcast(t.unit()), scale = broadcast(t.other_scale), zero = {}, one = broadcast(1);
  for (int64_t row = begin; row < end; ++row) {
    double* stats = job.stats + row * job.width;
    const float top = row_maximum<kMasks, kLogits>(t, row);
    const bool empty = top == kNothing;  // no pair counts, or only infinitely bad ones, or NaN
    const Vec reference = broadcast(empty ? 0 : top);
    Vec exps = {}, positives = {}, positive_count = {}, all = {}, all_count = {};
    double exp_sum = 0;
    for_each_part<kMasks>(
        t, row,
        [&](int64_t col) SSLK_LAMBDA {
          const Vec v = value<kLogits>(t, similarity<kLogits>(t, row, col, LANES), scale, col, LANES);
          exps += exp_nonpositive((v - reference) * unit);
        },
        [&](int64_t col, int count) SSLK_LAMBDA {
          const Part p = part_at<kLogits>(t, row, col, count);
          const Vec z = p.ignored ? zero : (p.v - reference) * unit;  // may be positive where ignored
          exps += p.ignored ? zero : exp_nonpositive(z);
          positives += p.positive ? p.v : zero;
          positive_count += p.positive ? one : zero;
          if (of_all) {
            all += p.v;
            all_count += p.ignored ? zero : one;
          }
        },
        [&]() SSLK_LAMBDA {
          exp_sum += sum(exps);
          stats[2] += sum(positives);
          stats[3] += sum(positive_count);
          if (of_all) {
            stats[4] += sum(all);
            stats[5] += sum(all_count);
          }
          exps = positives = positive_count = all = all_count = Vec{};
        });
    if (!empty) {
      merge(stats, top, exp_sum, t.unit());
    } else if (exp_sum != exp_sum) {
      stats[1] = exp_sum;
    }
  }
}

static bool looks_at_pairs(const RowTile& t) { return t.row_ids || t.guided; }

static void stats_of_prefix(const RowStats& s, int64_t begin, int64_t end) {
  if (looks_at_pairs(s.tile) || s.width == kAllRowStats) {
    return s.tile.logits ? stats_rows<true, true>(s, begin, end) : stats_rows<true, false>(s, begin, end);
  }
  return s.tile.logits ? stats_rows<false, true>(s, begin, end) : stats_rows<false, false>(s, begin, end);
}

// Adds the similarities of the prefix before.
static void add_row(const RowTile& t, const RowTile& before, int64_t row) {
  float* sums = t.raw + row * t.row_stride;
  const float* more = before.raw + row * before.row_stride;
  for_each_vector(t.cols, [&](int64_t col, int count) SSLK_LAMBDA {
    store_first(sums + col, load_first<Vec>(sums + col, count) + load_first<Vec>(more + col, count), count);
  });
}

static void row_softmax_stats(const RowStats* prefixes, int64_t count, int64_t begin, int64_t end) {
  if (count == 1) return stats_of_prefix(*prefixes, begin, end);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t k = 0; k < count; ++k) {
      if (k) add_row(prefixes[k].tile, prefixes[k - 1].tile, row);
      stats_of_prefix(prefixes[k], row, row + 1);
    }
  }
}

static void row_softmax_guide(const RowGuide& g, int64_t begin, int64_t end) {
  const RowTile& t = g.tile;
  for (int64_t row = begin; row < end; ++row) {
    const float* scores = g.scores + row * g.score_stride;
    const Vec threshold = broadcast(g.threshold[row]);
    for_each_vector(t.cols, [&](int64_t col, int count) SSLK_LAMBDA {
      float* raw = t.raw + row * t.row_stride + col;
      const Mask above = load_first<Vec>(scores + col, count) > threshold;
      const Mask out = above & ~part_at<false>(t, row, col, count).positive;
      store_first(raw, out ? broadcast(kLeftOut) : load_first<Vec>(raw, count), count);
    });
  }
}

template <bool kMasks, bool kLogits>
static void grad_rows(const RowGrad& g, const RowTile* longer, int64_t begin, int64_t end) {
  const RowTile& t = g.tile;
  const Vec unit = broadcast(t.unit()), scale = broadcast(t.other_scale), zero = {};
  for (int64_t row = begin; row < end; ++row) {
    float* raw = t.raw + row * t.row_stride;
    const float* add = longer ? longer->raw + row * longer->row_stride : nullptr;
    float* col_sums = g.col_sums ? g.col_sums + row / g.kChunk * t.cols : nullptr;
    float* col_moments = g.col_moments ? g.col_moments + row / g.kChunk * t.cols : nullptr;
    const Vec top = broadcast(g.top[row]), log_sum = broadcast(g.log_sum[row]), weight = broadcast(g.weight[row]);
    const Vec target = broadcast(g.target[row]), all = broadcast(g.all ? g.all[row] : 0);
    Vec moment = {};

    auto finish = [&](Vec G, Vec s, int64_t col, int count) SSLK_LAMBDA {
      const Vec product = G * s;
      moment += product;
      if (col_sums) store_first(col_sums + col, load_first<Vec>(col_sums + col, count) + G, count);
      if (col_moments) store_first(col_moments + col, load_first<Vec>(col_moments + col, count) + product, count);
      if (!g.write) return;
      if (kLogits && t.row_factor) G = G * t.row_factor[row] * load_first<Vec>(t.col_factor + col, count);
      if (add) G += load_first<Vec>(add + col, count);
      store_first(raw + col, G, count);
    };
    for_each_part<kMasks>(
        t, row,
        [&](int64_t col) SSLK_LAMBDA {
          const Vec s = similarity<kLogits>(t, row, col, LANES), v = value<kLogits>(t, s, scale, col, LANES);
          finish(weight * probability((v - top) * unit - log_sum) - all, s, col, LANES);
        },
        [&](int64_t col, int count) SSLK_LAMBDA {
          const Part p = part_at<kLogits>(t, row, col, count);
          const Vec z = p.ignored ? zero : (p.v - top) * unit - log_sum;  // may be positive where ignored
          Vec G = weight * probability(z) - all;
          G = p.positive ? G - target : G;
          finish(p.ignored ? zero : G, p.s, col, count);
        },
        [&]() SSLK_LAMBDA {
          g.moments[row * g.moment_stride] += sum(moment);
          moment = Vec{};
        });
  }
}

// `longer` holds what is added to what is written, or is null.
static void grad_of_prefix(const RowGrad& g, const RowTile* longer, int64_t begin, int64_t end) {
  if (looks_at_pairs(g.tile) || (g.all && g.tile.bias)) {  // what a bias removes gets no share of a target
    return g.tile.logits ? grad_rows<true, true>(g, longer, begin, end) : grad_rows<true, false>(g, longer, begin, end);
  }
  return g.tile.logits ? grad_rows<false, true>(g, longer, begin, end) : grad_rows<false, false>(g, longer, begin, end);
}

static void row_softmax_grad(const RowGrad* prefixes, int64_t count, bool summed, int64_t begin, int64_t end) {
  const RowTile& tile = prefixes->tile;
  const int64_t chunk = RowGrad::kChunk, first = begin * chunk;
  const int64_t last = end * chunk < tile.rows ? end * chunk : tile.rows;
  const size_t bytes = (end - begin) * tile.cols * sizeof(float);
  for (int64_t k = 0; k < count; ++k) {
    if (prefixes[k].col_sums) std::memset(prefixes[k].col_sums + begin * tile.cols, 0, bytes);
    if (prefixes[k].col_moments) std::memset(prefixes[k].col_moments + begin * tile.cols, 0, bytes);
  }
  if (count == 1) return grad_of_prefix(*prefixes, nullptr, first, last);
  for (int64_t row = first; row < last; ++row) {
    for (int64_t k = 1; k < count && !summed; ++k) add_row(prefixes[k].tile, prefixes[k - 1].tile, row);
    for (int64_t k = count - 1; k >= 0; --k) {
      const bool is_longest = k == count - 1;
      grad_of_prefix(prefixes[k], is_longest || !prefixes[k].write ? nullptr : &prefixes[k + 1].tile, row, row + 1);
    }
  }
}
