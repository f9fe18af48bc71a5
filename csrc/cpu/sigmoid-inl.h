// Sigmoid contrastive loss over a tile of raw similarities r = x_i . y_j, in place and in one pass.
//
//   z = scale r + bias,   s = +1 on positives, -1 elsewhere
//   loss = softplus(-s z) = max(-s z, 0) + log1p(e),   e = exp(-|z|)
//   G = d loss / d z = -s sigmoid(-s z),   sigmoid(|z|) = 1 / (1 + e),   sigmoid(-|z|) = e / (1 + e)
//
// One exponential and one division per element; log1p(e) is a polynomial, since e lies in [0, 1]. Working with -s z
// throughout keeps confident positives exact: nothing is added for a negative and then taken back.

struct RowSums {
  Vec loss, scale, bias;
};

// Columns after which the fp32 sums of a row go to double: a row may be millions of columns long.
constexpr int64_t kColumnsPerSum = 64 * LANES;

SSLK_INLINE void add_up(double* stats, RowSums& sums, bool grad) {
  stats[0] += sum(sums.loss);
  if (grad) {
    stats[1] += sum(sums.scale);
    stats[2] += sum(sums.bias);
  }
  sums = RowSums{};
}

// One vector of a row. Lanes set in `ignored` contribute exactly zero, whatever they hold.
template <bool kMasked, bool kGrad>
SSLK_INLINE Vec sigmoid_block(Vec raw, Vec scale, Vec bias, Mask positive, Mask ignored, RowSums& sums) {
  if (kMasked) raw = ignored ? broadcast(0) : raw;
  Vec z = raw * scale + bias;
  if (kMasked) z = positive ? -z : z;
  Vec e = exp_nonpositive(z < 0 ? z : -z);
  Vec loss = max_nan(z, 0) + log1p_unit(e);
  if (kMasked) loss = ignored ? broadcast(0) : loss;
  sums.loss += loss;
  if (!kGrad) return raw;
  Vec big = 1.f / (1.f + e);
  Vec grad = z < 0 ? e * big : big;
  if (kMasked) {
    grad = positive ? -grad : grad;
    grad = ignored ? broadcast(0) : grad;
  }
  sums.scale += grad * raw;
  sums.bias += grad;
  return grad;
}

template <bool kIds, bool kGrad>
SSLK_INLINE void sigmoid_row(const SigmoidPanel& p, int64_t row) {
  float* tile = p.tile + row * p.row_stride;
  const Vec scale = broadcast(p.scale), bias = broadcast(p.bias);
  const Mask lanes = lane_index(), none = {};
  const int64_t diagonal = row + p.diagonal;
  const Mask drop_same_id = none - (p.ignore_same_id ? 1 : 0);
  double* stats = p.stats + row * p.stats_width;
  RowSums sums = {};

  // Elements [col, col + LANES) with the diagonal and equal ids found; lanes from `valid` on are ignored.
  auto masked = [&](const float* in, const int64_t* ids, int64_t col, int valid) __attribute__((always_inline)) {
    const bool has_diagonal = diagonal >= col && diagonal < col + LANES;
    Mask positive = lanes == (none + (has_diagonal ? int32_t(diagonal - col) : -1));
    Mask ignored = lanes >= (none + valid);
    if (kIds) {
      Mask same = __builtin_convertvector(load<Long>(ids) == p.row_ids[row], Mask);
      ignored |= same & ~positive & drop_same_id;
      positive |= same & ~drop_same_id;
    }
    return sigmoid_block<true, kGrad>(load<Vec>(in), scale, bias, positive, ignored, sums);
  };

  int64_t col = 0;
  for (; col + LANES <= p.cols; col += LANES) {
    Vec out;
    if (kIds || (diagonal >= col && diagonal < col + LANES)) {
      out = masked(tile + col, p.col_ids + (kIds ? col : 0), col, LANES);
    } else {
      out = sigmoid_block<false, kGrad>(load<Vec>(tile + col), scale, bias, none, none, sums);
    }
    if (kGrad && p.write_grad) store(tile + col, out);
    if (col % kColumnsPerSum == kColumnsPerSum - LANES) add_up(stats, sums, kGrad);
  }
  if (const int rest = int(p.cols - col)) {
    float buffer[LANES] = {};
    int64_t ids[LANES] = {};
    std::memcpy(buffer, tile + col, rest * sizeof(float));
    if (kIds) std::memcpy(ids, p.col_ids + col, rest * sizeof(int64_t));
    Vec out = masked(buffer, ids, col, rest);
    if (kGrad && p.write_grad) std::memcpy(tile + col, &out, rest * sizeof(float));
  }
  add_up(stats, sums, kGrad);
}

template <bool kIds, bool kGrad>
static void sigmoid_rows(const SigmoidPanel& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) sigmoid_row<kIds, kGrad>(p, row);
}

static void sigmoid_panel(const SigmoidPanel& p, int64_t begin, int64_t end) {
  const bool grad = p.stats_width == 3;
  if (p.row_ids) return grad ? sigmoid_rows<true, true>(p, begin, end) : sigmoid_rows<true, false>(p, begin, end);
  return grad ? sigmoid_rows<false, true>(p, begin, end) : sigmoid_rows<false, false>(p, begin, end);
}
