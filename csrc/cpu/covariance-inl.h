// Sums of a few numbers are fp32, sums of these are double. The means are exact to more than fp32: none of a mean that
// is large beside the deviations from it is left in them, and a constant column becomes 0.
//
// Columns are taken in blocks, whose sums stay in the first cache, and down a few rows at a time.

typedef double Wide __attribute__((vector_size(LANES * sizeof(double))));

constexpr int64_t kBlock = 256;  // columns; a multiple of LANES, so that sums are added to in whole vectors
constexpr int64_t kShort = 16;   // numbers in an fp32 sum

SSLK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

SSLK_INLINE void add(double* sums, Vec v) {
  const Wide wide = load<Wide>(sums) + __builtin_convertvector(v, Wide);
  std::memcpy(sums, &wide, sizeof wide);
}

// sum + lost becomes sum + lost + v, but for the rounding of lost.
SSLK_INLINE void add_exactly(Vec& sum, Vec& lost, Vec v) {
  const Vec next = sum + v, added = next - sum;
  lost += (sum - (next - added)) + (v - added);
  sum = next;
}

// Calls body(row, end, col, count) for a few rows of a vector of columns at a time.
template <typename Body>
SSLK_INLINE void for_each_strip(int64_t rows, int64_t cols, Body body) {
  for (int64_t row = 0; row < rows; row += kShort) {
    const int64_t end = least(rows, row + kShort);
    for_each_vector(cols, [&](int64_t col, int count) __attribute__((always_inline)) { body(row, end, col, count); });
  }
}

template <typename Type>
SSLK_INLINE const typename Type::Element* row_of(const Views& views, int view, int64_t row) {
  return static_cast<const typename Type::Element*>(views.z[view]) + row * views.stride[view];
}

// Divides centred columns by the root of variance + eps, and takes their products.
static void standardise(const Views& views, const double (*squares)[kBlock], int64_t first, int64_t cols) {
  double products[kBlock] = {};
  float* sigma[2] = {views.columns + first, views.columns + views.width + first};
  for (int view = 0; view < 2; ++view) {
    for (int64_t col = 0; col < cols; ++col) {
      sigma[view][col] = float(std::sqrt(squares[view][col] / double(views.rows) + views.eps));
    }
  }
  for_each_strip(views.rows, cols, [&](int64_t row, int64_t end, int64_t col, int count)
                     __attribute__((always_inline)) {
    Vec sum = {};
    for (; row < end; ++row) {
      const int64_t at = row * views.width + first + col;
      Vec v[2];
      for (int view = 0; view < 2; ++view) {
        v[view] = load_features<Float32>(views.out[view] + at, count);
        v[view] /= load_features<Float32>(sigma[view] + col, count);
        store_features<Float32>(views.out[view] + at, v[view], count);
      }
      sum += v[0] * v[1];
    }
    add(products + col, sum);
  });
  for (int64_t col = 0; col < cols; ++col) views.columns[2 * views.width + first + col] = float(products[col]);
}

template <typename Type>
static void center_block(const Views& views, int64_t first, int64_t cols) {
  float mean[2][kBlock] = {}, rest[2][kBlock] = {};  // what fp32 holds of a mean, and what it does not
  double squares[2][kBlock] = {}, differences[kBlock] = {};
  for (int view = 0; view < 2; ++view) {
    double sums[kBlock] = {};
    for_each_strip(views.rows, cols, [&](int64_t row, int64_t end, int64_t col, int count)
                       __attribute__((always_inline)) {
      Vec sum = {}, lost = {};
      for (; row < end; ++row) {
        add_exactly(sum, lost, load_features<Type>(row_of<Type>(views, view, row) + first + col, count));
      }
      add(sums + col, sum);
      add(sums + col, lost);
    });
    for (int64_t col = 0; col < cols; ++col) {
      const double exact = sums[col] / double(views.rows);
      mean[view][col] = float(exact);
      rest[view][col] = float(exact - double(mean[view][col]));
    }
  }
  for_each_strip(views.rows, cols, [&](int64_t row, int64_t end, int64_t col, int count)
                     __attribute__((always_inline)) {
    Vec sums[2] = {}, of_differences = {};
    for (; row < end; ++row) {
      Vec z[2];
      for (int view = 0; view < 2; ++view) {
        z[view] = load_features<Type>(row_of<Type>(views, view, row) + first + col, count);
        const Vec c = (z[view] - load<Vec>(mean[view] + col)) - load<Vec>(rest[view] + col);
        store_features<Float32>(views.out[view] + row * views.width + first + col, c, count);
        sums[view] += c * c;
      }
      of_differences += (z[0] - z[1]) * (z[0] - z[1]);
    }
    for (int view = 0; view < 2; ++view) add(squares[view] + col, sums[view]);
    add(differences + col, of_differences);
  });
  if (views.standardise) return standardise(views, squares, first, cols);
  const double* sums[3] = {squares[0], squares[1], differences};
  for (int k = 0; k < 3; ++k) {
    for (int64_t col = 0; col < cols; ++col) views.columns[k * views.width + first + col] = float(sums[k][col]);
  }
}

static void center_views(const Views& views, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t cols = least(end - first, kBlock);
    switch (views.type) {
      case FeatureType::kFloat32:
        center_block<Float32>(views, first, cols);
        break;
      case FeatureType::kBFloat16:
        center_block<BFloat16>(views, first, cols);
        break;
      case FeatureType::kFloat16:
        center_block<Float16>(views, first, cols);
        break;
    }
  }
}

static void row_products(const RowProducts& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float *a = job.a + row * job.a_stride, *b = job.b + row * job.b_stride;
    double sums[LANES] = {};
    for (int64_t first = 0; first < job.cols; first += kShort * LANES) {
      Vec products = {};
      const int64_t cols = least(job.cols - first, kShort * LANES);
      for_each_vector(cols, [&](int64_t col, int count) __attribute__((always_inline)) {
        products += load_features<Float32>(a + first + col, count) * load_features<Float32>(b + first + col, count);
      });
      add(sums, products);
    }
    job.out[row] = 0;
    for (double sum : sums) job.out[row] += sum;
  }
}

template <typename Type>
static void vicreg_rows(const Views& views, int view, const ViewGradient& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const auto *za = row_of<Type>(views, 0, row), *zb = row_of<Type>(views, 1, row);
    const float* c = views.out[view] + row * views.width;
    float* gradient = job.gradient + row * views.width;
    for_each_vector(views.width, [&](int64_t col, int count) __attribute__((always_inline)) {
      const Vec difference = load_features<Type>(za + col, count) - load_features<Type>(zb + col, count);
      Vec g = load_features<Float32>(gradient + col, count) * job.factor;
      g += load_features<Float32>(job.weights + col, count) * load_features<Float32>(c + col, count);
      store_features<Float32>(gradient + col, g + difference * job.invariance, count);
    });
  }
}

static void vicreg_gradient(const Views& views, int view, const ViewGradient& job, int64_t begin, int64_t end) {
  switch (views.type) {
    case FeatureType::kFloat32:
      return vicreg_rows<Float32>(views, view, job, begin, end);
    case FeatureType::kBFloat16:
      return vicreg_rows<BFloat16>(views, view, job, begin, end);
    case FeatureType::kFloat16:
      return vicreg_rows<Float16>(views, view, job, begin, end);
  }
}

static void barlow_twins_block(const Views& views, int view, const ViewGradient& job, int64_t first, int64_t cols) {
  double products[kBlock] = {};
  float along[kBlock] = {};
  for_each_strip(views.rows, cols, [&](int64_t row, int64_t end, int64_t col, int count)
                     __attribute__((always_inline)) {
    Vec sum = {};
    for (; row < end; ++row) {
      const int64_t at = row * views.width + first + col;
      Vec g = load_features<Float32>(job.gradient + at, count) * job.factor;
      g += load_features<Float32>(job.weights + first + col, count) *
           load_features<Float32>(views.out[1 - view] + at, count);
      store_features<Float32>(job.gradient + at, g, count);
      sum += g * load_features<Float32>(views.out[view] + at, count);
    }
    add(products + col, sum);
  });
  for (int64_t col = 0; col < cols; ++col) along[col] = float(products[col] / double(views.rows));
  const float* sigma = views.columns + view * views.width + first;
  for (int64_t row = 0; row < views.rows; ++row) {
    for_each_vector(cols, [&](int64_t col, int count) __attribute__((always_inline)) {
      const int64_t at = row * views.width + first + col;
      const Vec g = load_features<Float32>(job.gradient + at, count) -
                    load<Vec>(along + col) * load_features<Float32>(views.out[view] + at, count);
      store_features<Float32>(job.gradient + at, g / load_features<Float32>(sigma + col, count), count);
    });
  }
}

static void barlow_twins_gradient(const Views& views, int view, const ViewGradient& job, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kBlock) {
    barlow_twins_block(views, view, job, first, least(end - first, kBlock));
  }
}
