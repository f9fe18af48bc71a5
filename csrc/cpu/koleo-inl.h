// The largest element of each row, and of each column, of a tile, and where it stands; then the rows by themselves.
//
// Every lane keeps the largest value that it has met and its position; it meets positions in rising order and moves on
// to a strictly larger value only, so that among equals it holds the first. Where a row ends, the largest value wins
// among its lanes, and among equals the smallest position. Columns are taken a few vectors at a time, whose state stays
// in registers down all rows.

constexpr float kInfinity = __builtin_inff();
constexpr int kVectors = 4;  // comparisons in flight

struct Largest {
  Vec value;
  Mask at;
};

SSLK_INLINE Largest nothing_yet() { return {broadcast(-kInfinity), Mask{}}; }

SSLK_INLINE void meet(Largest& so_far, Vec value, Mask position) {
  const Mask larger = value > so_far.value;
  so_far.value = larger ? value : so_far.value;
  so_far.at = larger ? position : so_far.at;
}

SSLK_INLINE Vec load_or_nothing(const float* p, int64_t count) {
  Vec v = broadcast(-kInfinity);
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

SSLK_INLINE void settle(const KoleoSide& side, int64_t k, float value, int64_t neighbor) {
  if (value > side.best[k]) {
    side.best[k] = value;
    side.neighbor[k] = neighbor;
  }
}

static void koleo_rows(const KoleoPanel& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    float* row = p.tile + i * p.row_stride;
    if (p.row.first == p.col.first) row[i] = -kInfinity;
    Largest found[kVectors];
    for (Largest& f : found) f = nothing_yet();
    int64_t col = 0;
    for (; col + kVectors * LANES <= p.cols; col += kVectors * LANES) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = col + v * LANES;
        meet(found[v], load<Vec>(row + at), lane_index() + int32_t(at));
      }
    }
    for (; col < p.cols; col += LANES) {
      const int64_t left = p.cols - col;
      meet(found[0], load_or_nothing(row + col, left < LANES ? left : LANES), lane_index() + int32_t(col));
    }
    float value = -kInfinity;
    int32_t at = 0;
    for (const Largest& f : found) {
      for (int k = 0; k < LANES; ++k) {
        if (f.value[k] > value || (f.value[k] == value && f.at[k] < at)) {
          value = f.value[k];
          at = f.at[k];
        }
      }
    }
    settle(p.row, i, value, p.col.first + at);
  }
}

static void koleo_columns(const KoleoPanel& p, int64_t begin, int64_t end) {
  for (int64_t col = begin; col < end; col += kVectors * LANES) {
    const int64_t count = end - col < kVectors * LANES ? end - col : kVectors * LANES;
    const bool whole = count == kVectors * LANES;
    Largest found[kVectors];
    for (Largest& f : found) f = nothing_yet();
    for (int64_t i = 0; i < p.rows; ++i) {
      const float* row = p.tile + i * p.row_stride + col;
      for (int v = 0; v < kVectors; ++v) {
        const int64_t left = count - v * LANES;
        const Vec value = whole ? load<Vec>(row + v * LANES)
                                : load_or_nothing(row + v * LANES, left < 0 ? 0 : left < LANES ? left : LANES);
        meet(found[v], value, Mask{} + int32_t(i));
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      const Largest& f = found[k / LANES];
      settle(p.col, col + k, f.value[k % LANES], p.row.first + f.at[k % LANES]);
    }
  }
}

SSLK_INLINE float divisor_of(const KoleoRows& rows, int64_t i) {
  return rows.norm[i] < rows.eps ? rows.eps : rows.norm[i];
}

// u_i, columns [col, col + count) at a time.
template <typename Type>
SSLK_INLINE auto unit_row(const KoleoRows& rows, int64_t i) {
  const auto* x = static_cast<const typename Type::Element*>(rows.x) + i * rows.stride;
  const float divisor = divisor_of(rows, i);
  return [=](int64_t col, int count) __attribute__((always_inline)) {
    return load_features<Type>(x + col, count) / divisor;
  };
}

template <typename Type>
static void koleo_unit_rows_of(const KoleoRows& rows, float* unit, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const auto* x = static_cast<const typename Type::Element*>(rows.x) + i * rows.stride;
    rows.norm[i] = norm_of_row(rows.width, [&](int64_t col, int count) __attribute__((always_inline)) {
      return load_features<Type>(x + col, count);
    });
    const auto u = unit_row<Type>(rows, i);
    for_each_vector(rows.width, [&](int64_t col, int count) __attribute__((always_inline)) {
      const Vec v = u(col, count);
      store_features<Float32>(unit + i * rows.width + col, v == v ? v : broadcast(0), count);
    });
  }
}

template <typename Type>
static void koleo_distances_of(const KoleoRows& rows, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const auto u = unit_row<Type>(rows, i), v = unit_row<Type>(rows, rows.neighbor[i]);
    rows.distance[i] = norm_of_row(rows.width, [&](int64_t col, int count) __attribute__((always_inline)) {
      const Vec d = u(col, count) - v(col, count) + rows.eps;
      return lane_index() < count ? d : broadcast(0);
    });
  }
}

// With the push p_i of row i, du_i = -p_i d_i + sum of p_k d_k over the rows k whose neighbour i is; and the gradient
// is what of du_i is orthogonal to u_i, over |x_i|, or all of it where |x_i| does not divide u_i.
template <typename Type>
static void koleo_gradient_of(const KoleoGradient& g, float* du, int64_t begin, int64_t end) {
  const KoleoRows& rows = g.rows;
  for (int64_t i = begin; i < end; ++i) {
    const auto u = unit_row<Type>(rows, i), v = unit_row<Type>(rows, rows.neighbor[i]);
    for_each_vector(rows.width, [&](int64_t col, int count) __attribute__((always_inline)) {
      store_features<Float32>(du + col, -g.push[i] * (u(col, count) - v(col, count) + rows.eps), count);
    });
    for (int64_t at = g.first[i]; at < g.first[i + 1]; ++at) {
      const int64_t k = g.those[at];
      const auto w = unit_row<Type>(rows, k);
      for_each_vector(rows.width, [&](int64_t col, int count) __attribute__((always_inline)) {
        const Vec pushed = rounded(g.push[k] * (w(col, count) - u(col, count) + rows.eps));  // so that equals cancel
        store_features<Float32>(du + col, load_features<Float32>(du + col, count) + pushed, count);
      });
    }
    const float divisor = divisor_of(rows, i);
    float radial = 0;
    if (rows.norm[i] > rows.eps) {
      radial = float(sum_of_row(rows.width, [&](int64_t col, int count) __attribute__((always_inline)) {
        return load_features<Float32>(du + col, count) * u(col, count);
      }));
    }
    auto* out = static_cast<typename Type::Element*>(g.gradient) + i * rows.width;
    for_each_vector(rows.width, [&](int64_t col, int count) __attribute__((always_inline)) {
      const Vec along = load_features<Float32>(du + col, count) - u(col, count) * radial;
      store_features<Type>(out + col, along / divisor, count);
    });
  }
}

static void koleo_unit_rows(const KoleoRows& rows, float* unit, int64_t begin, int64_t end) {
  with_type(rows.type, [&](auto type) { koleo_unit_rows_of<decltype(type)>(rows, unit, begin, end); });
}

static void koleo_distances(const KoleoRows& rows, int64_t begin, int64_t end) {
  with_type(rows.type, [&](auto type) { koleo_distances_of<decltype(type)>(rows, begin, end); });
}

static void koleo_gradient(const KoleoGradient& g, float* scratch, int64_t begin, int64_t end) {
  with_type(g.rows.type, [&](auto type) { koleo_gradient_of<decltype(type)>(g, scratch, begin, end); });
}
