// The largest element of each row, and of each column, of a tile, and where it stands.
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
    const float* row = p.tile + i * p.row_stride;
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
