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
  Vec u, v;  // 0 where left out
};

template <bool kLogits>
SSLK_INLINE float factor_of(const RowTile& t, int64_t row) {
  return kLogits && t.row_factor ? t.row_factor[row] : 1;
}

// u = s over the factor of the row.
template <bool kLogits>
SSLK_INLINE Vec similarity(const RowTile& t, int64_t row, int64_t col, int count) {
  const Vec raw = load_first<Vec>(t.raw + row * t.row_stride + col, count);
  return kLogits && t.col_factor ? raw * load_first<Vec>(t.col_factor + col, count) : raw;
}

// v of it, where the scale is times the factor of the row.
template <bool kLogits>
SSLK_INLINE Vec value(const RowTile& t, Vec u, Vec scale, int64_t col, int count) {
  if (!kLogits) return u;
  return t.bias ? u * scale + load_first<Vec>(t.bias + col, count) : u * scale;
}

// z of a difference of v.
template <bool kLogits>
SSLK_INLINE Vec logit(Vec v, Vec unit) {
  return kLogits ? v : v * unit;
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
  p.u = p.ignored ? broadcast(0) : similarity<kLogits>(t, row, col, count);
  const Vec scale = p.positive ? broadcast(t.scale) : same ? broadcast(t.same_scale) : broadcast(t.other_scale);
  p.v = p.ignored ? broadcast(0) : value<kLogits>(t, p.u, scale * factor_of<kLogits>(t, row), col, count);
  return p;
}

// Calls plain(col) for the full vectors of a row in which every pair counts as a negative, masked(col, count) for the
// others, in order, and flush() before fp32 sums grow long.
template <bool kMasks, typename Plain, typename Masked, typename Flush>
SSLK_INLINE void for_each_part(const RowTile& t, int64_t row, Plain plain, Masked masked, Flush flush) {
  const int64_t whole = t.cols - t.cols % LANES, target = t.target[row];
  const int64_t special = target >= 0 && target < whole ? target - target % LANES : whole;
  for (int64_t col = 0; col < whole; flush()) {
    const int64_t stop = col + 64 * LANES < whole ? col + 64 * LANES : whole;
    while (col < stop) {
      const int64_t next = kMasks ? col : special >= col && special < stop ? special : stop;
      for (; col < next; col += LANES) plain(col);
      if (col < stop) {
        masked(col, LANES);
        col += LANES;
      }
    }
  }
  if (whole < t.cols) masked(whole, int(t.cols - whole));
  flush();
}

// Adds the similarities of the prefix before.
SSLK_INLINE void add_shorter(const RowTile& t, const RowTile& shorter, int64_t row, int64_t col, int count) {
  float* sums = t.raw + row * t.row_stride + col;
  const Vec more = load_first<Vec>(shorter.raw + row * shorter.row_stride + col, count);
  store_first(sums, load_first<Vec>(sums, count) + more, count);
}

// The largest v of a row that counts; NaNs are left to the sum. `shorter` is the prefix before, if there is one.
template <bool kMasks, bool kLogits>
SSLK_INLINE float row_maximum(const RowTile& t, const RowTile* shorter, int64_t row) {
  Vec top = broadcast(kNothing);
  const float* next = t.raw + (row + 1 < t.rows ? row + 1 : row) * t.row_stride;
  const Vec scale = broadcast(t.other_scale * factor_of<kLogits>(t, row));
  for_each_part<kMasks>(
      t, row,
      [&](int64_t col) SSLK_LAMBDA {
        if (shorter) add_shorter(t, *shorter, row, col, LANES);
        __builtin_prefetch(next + col, 1, 2);
        const Vec v = value<kLogits>(t, similarity<kLogits>(t, row, col, LANES), scale, col, LANES);
        top = v > top ? v : top;
      },
      [&](int64_t col, int count) SSLK_LAMBDA {
        if (shorter) add_shorter(t, *shorter, row, col, count);
        const Part p = part_at<kLogits>(t, row, col, count);
        top = (p.v > top) & ~p.ignored ? p.v : top;
      },
      []() SSLK_LAMBDA {});
  return largest(top);
}

template <bool kMasks, bool kLogits>
static void stats_rows(const RowStats& job, const RowTile* shorter, int64_t begin, int64_t end) {
  const RowTile& t = job.tile;
  const bool of_all = job.width == kAllRowStats;
  const Vec unit = broadcast(t.unit()), zero = {}, one = broadcast(1);
  for (int64_t row = begin; row < end; ++row) {
    const Vec scale = broadcast(t.other_scale * factor_of<kLogits>(t, row));
    double* stats = job.stats + row * job.width;
    const float top = row_maximum<kMasks, kLogits>(t, shorter, row);
    const bool empty = top == kNothing;  // no pair counts, or only infinitely bad ones, or NaN
    const Vec reference = broadcast(empty ? 0 : top);
    Vec exps = {}, positives = {}, positive_count = {}, all = {}, all_count = {};
    double exp_sum = 0;
    for_each_part<kMasks>(
        t, row,
        [&](int64_t col) SSLK_LAMBDA {
          const Vec v = value<kLogits>(t, similarity<kLogits>(t, row, col, LANES), scale, col, LANES);
          const Vec e = exp_nonpositive(logit<kLogits>(v - reference, unit));
          exps += e;
          if (job.exps) store(job.exps + col, e);
        },
        [&](int64_t col, int count) SSLK_LAMBDA {
          const Part p = part_at<kLogits>(t, row, col, count);
          const Vec z = p.ignored ? zero : logit<kLogits>(p.v - reference, unit);  // may be positive where ignored
          const Vec e = p.ignored ? zero : exp_nonpositive(z);
          exps += e;
          if (job.exps) store_first(job.exps + col, e, count);
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

static void stats_of_prefix(const RowStats& s, const RowTile* shorter, int64_t begin, int64_t end) {
  if (looks_at_pairs(s.tile) || s.width == kAllRowStats) {
    return s.tile.logits ? stats_rows<true, true>(s, shorter, begin, end)
                         : stats_rows<true, false>(s, shorter, begin, end);
  }
  return s.tile.logits ? stats_rows<false, true>(s, shorter, begin, end)
                       : stats_rows<false, false>(s, shorter, begin, end);
}

static void row_softmax_stats(const RowStats* prefixes, int64_t count, int64_t begin, int64_t end) {
  if (count == 1) return stats_of_prefix(*prefixes, nullptr, begin, end);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t k = 0; k < count; ++k) {
      stats_of_prefix(prefixes[k], k ? &prefixes[k - 1].tile : nullptr, row, row + 1);
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

SSLK_INLINE Vec kept_probability(const RowKept& kept, int64_t col, int count) {
  const Vec e = load_first<Vec>(kept.exps + col, count);
  return (e < kept.least ? broadcast(0) : e) * kept.inverse;
}

SSLK_INLINE RowSide side_of(const RowGrad& g, int64_t row) {
  return {g.top[row], g.log_sum[row], g.weight[row], g.target[row], g.all ? g.all[row] : 0};
}

// `kept` is of the one row, or null.
template <bool kMasks, bool kLogits>
static void grad_rows(const RowGrad& g, const RowTile* longer, const RowKept* kept, int64_t begin, int64_t end) {
  const RowTile& t = g.tile;
  const Vec unit = broadcast(t.unit()), zero = {};
  for (int64_t row = begin; row < end; ++row) {
    const float factor = factor_of<kLogits>(t, row);
    const Vec scale = broadcast(t.other_scale * factor);
    float* raw = t.raw + row * t.row_stride;
    const float* add = longer ? longer->raw + row * longer->row_stride : nullptr;
    float* col_sums = g.col_sums ? g.col_sums + row / g.kChunk * t.cols : nullptr;
    float* col_moments = g.col_moments ? g.col_moments + row / g.kChunk * t.cols : nullptr;
    const RowSide side = kept ? kept->side : side_of(g, row);
    const Vec top = broadcast(side.top), log_sum = broadcast(side.log_sum), weight = broadcast(side.weight);
    const Vec target = broadcast(side.target), all = broadcast(side.all);
    Vec moment = {};

    auto finish = [&](Vec G, Vec u, int64_t col, int count) SSLK_LAMBDA {
      const Vec product = G * u;
      moment += product;
      if (col_sums) store_first(col_sums + col, load_first<Vec>(col_sums + col, count) + G, count);
      if (col_moments) {
        store_first(col_moments + col, load_first<Vec>(col_moments + col, count) + product * factor, count);
      }
      if (!g.write) return;
      if (kLogits && t.col_factor) G = G * factor * load_first<Vec>(t.col_factor + col, count);
      if (add) G += load_first<Vec>(add + col, count);
      store_first(raw + col, G, count);
    };
    for_each_part<kMasks>(
        t, row,
        [&](int64_t col) SSLK_LAMBDA {
          const Vec u = similarity<kLogits>(t, row, col, LANES);
          const Vec P = kept ? kept_probability(*kept, col, LANES)
                             : probability(logit<kLogits>(value<kLogits>(t, u, scale, col, LANES) - top, unit) - log_sum);
          finish(weight * P - all, u, col, LANES);
        },
        [&](int64_t col, int count) SSLK_LAMBDA {
          const Part p = part_at<kLogits>(t, row, col, count);
          const Vec z = p.ignored ? zero : logit<kLogits>(p.v - top, unit) - log_sum;  // may be positive where ignored
          Vec G = weight * (kept ? kept_probability(*kept, col, count) : probability(z)) - all;
          G = p.positive ? G - target : G;
          finish(p.ignored ? zero : G, p.u, col, count);
        },
        [&]() SSLK_LAMBDA {
          g.moments[row * g.moment_stride] += factor * sum(moment);
          moment = Vec{};
        });
  }
}

// `longer` holds what is added to what is written, or is null.
static void grad_of_prefix(const RowGrad& g, const RowTile* longer, const RowKept* kept, int64_t begin, int64_t end) {
  const bool smooth = g.all || (kept && kept->side.all != 0);
  if (looks_at_pairs(g.tile) || (smooth && g.tile.bias)) {  // what a bias removes gets no share of a target
    return g.tile.logits ? grad_rows<true, true>(g, longer, kept, begin, end)
                         : grad_rows<true, false>(g, longer, kept, begin, end);
  }
  return g.tile.logits ? grad_rows<false, true>(g, longer, kept, begin, end)
                       : grad_rows<false, false>(g, longer, kept, begin, end);
}

// The row of all prefixes, the longest first. `kept` has one of each, or is null.
SSLK_INLINE void grad_of_row(const RowGrad* prefixes, int64_t count, const RowKept* kept, int64_t row) {
  for (int64_t k = count - 1; k >= 0; --k) {
    const RowTile* longer = k == count - 1 || !prefixes[k].write ? nullptr : &prefixes[k + 1].tile;
    grad_of_prefix(prefixes[k], longer, kept ? kept + k : nullptr, row, row + 1);
  }
}

// Rows of the steps [begin, end), whose sums by column begin at 0.
struct RowRange {
  int64_t first, last;
};

static RowRange begin_rows(const RowGrad* prefixes, int64_t count, int64_t begin, int64_t end) {
  const int64_t rows = prefixes->tile.rows, cols = prefixes->tile.cols, step = prefixes->step();
  const size_t bytes = (end - begin) * cols * sizeof(float);
  for (int64_t k = 0; k < count; ++k) {
    if (prefixes[k].col_sums) std::memset(prefixes[k].col_sums + begin * cols, 0, bytes);
    if (prefixes[k].col_moments) std::memset(prefixes[k].col_moments + begin * cols, 0, bytes);
  }
  return {begin * step, end * step < rows ? end * step : rows};
}

static void row_softmax_grad(const RowGrad* prefixes, int64_t count, bool summed, int64_t begin, int64_t end) {
  const RowRange rows = begin_rows(prefixes, count, begin, end);
  if (count == 1) return grad_of_prefix(*prefixes, nullptr, nullptr, rows.first, rows.last);
  for (int64_t row = rows.first; row < rows.last; ++row) {
    for (int64_t k = 1; k < count && !summed; ++k) {
      const RowTile &tile = prefixes[k].tile, &shorter = prefixes[k - 1].tile;
      for_each_vector(tile.cols, [&](int64_t col, int count) SSLK_LAMBDA { add_shorter(tile, shorter, row, col, count); });
    }
    grad_of_row(prefixes, count, nullptr, row);
  }
}

// `kept` [count] is for one row after the other.
static void row_softmax_visit(const RowVisit& v, RowKept* kept, int64_t begin, int64_t end) {
  const RowRange rows = begin_rows(v.grads, v.count, begin, end);
  for (int64_t row = rows.first; row < rows.last; ++row) {
    for (int64_t k = 0; k < v.count; ++k) {
      RowStats stats = v.stats[k];
      stats.exps = kept[k].exps;
      stats_of_prefix(stats, k ? &v.stats[k - 1].tile : nullptr, row, row + 1);
      v.keep(kept[k], k, row);
    }
    grad_of_row(v.grads, v.count, kept, row);
  }
}
