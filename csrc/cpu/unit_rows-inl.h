// u = z / n, rounded to the type of z, with n = max(|z|, eps), and g -> (g - u (u . g)) / n, or g / eps where |z| is less than eps; in fp32.

template <typename Type>
SSLK_INLINE float norm_of(const typename Type::Element* z, int64_t width) {
  Vec squares = {};
  double total = 0;
  for (int64_t first = 0; first < width; first += 64 * LANES) {  // fp32 sums stay short
    const int64_t cols = width - first < 64 * LANES ? width - first : 64 * LANES;
    for_each_vector(cols, [&](int64_t col, int count) __attribute__((always_inline)) {
      const Vec v = load_features<Type>(z + first + col, count);
      squares += v * v;
    });
    total += sum(squares);
    squares = Vec{};
  }
  if (total > 1e-30 && total < 1e38) return float(std::sqrt(total));
  total = 0;  // squares that fp32 cannot hold
  for (int64_t col = 0; col < width; ++col) {
    const double v = load_features<Type>(z + col, 1)[0];
    total += v * v;
  }
  return float(std::sqrt(total));
}

template <typename Type>
static void unit_rows_of(const UnitRows& job, int64_t begin, int64_t end) {
  typedef typename Type::Element Element;
  for (int64_t row = begin; row < end; ++row) {
    const Element* z = static_cast<const Element*>(job.z) + row * job.stride;
    float* unit = job.unit + row * job.width;
    const float norm = norm_of<Type>(z, job.width);
    job.norm[row] = norm;
    const float divisor = norm < job.eps ? job.eps : norm;
    for_each_vector(job.width, [&](int64_t col, int count) __attribute__((always_inline)) {
      const Vec u = Type::widen(Type::narrow(load_features<Type>(z + col, count) / divisor));
      store_features<Float32>(unit + col, u, count);
    });
  }
}

template <typename Type>
static void unit_rows_gradient_of(const UnitRows& job, int64_t begin, int64_t end) {
  typedef typename Type::Element Element;
  for (int64_t row = begin; row < end; ++row) {
    const Element* z = static_cast<const Element*>(job.z) + row * job.stride;
    const float* upstream = job.unit + row * job.width;
    Element* gradient = static_cast<Element*>(job.gradient) + row * job.width;
    const float norm = job.norm[row], divisor = norm < job.eps ? job.eps : norm;
    double radial = 0;
    if (!(norm < job.eps)) {
      for (int64_t first = 0; first < job.width; first += 64 * LANES) {
        const int64_t cols = job.width - first < 64 * LANES ? job.width - first : 64 * LANES;
        Vec products = {};
        for_each_vector(cols, [&](int64_t col, int count) __attribute__((always_inline)) {
          products += load_features<Type>(z + first + col, count) / divisor *
                      load_features<Float32>(upstream + first + col, count);
        });
        radial += sum(products);
      }
    }
    for_each_vector(job.width, [&](int64_t col, int count) __attribute__((always_inline)) {
      const Vec u = load_features<Type>(z + col, count) / divisor, g = load_features<Float32>(upstream + col, count);
      store_features<Type>(gradient + col, (g - u * float(radial)) / divisor, count);
    });
  }
}

static void unit_rows(const UnitRows& job, int64_t begin, int64_t end) {
  switch (job.type) {
    case FeatureType::kFloat32:
      return unit_rows_of<Float32>(job, begin, end);
    case FeatureType::kBFloat16:
      return unit_rows_of<BFloat16>(job, begin, end);
    case FeatureType::kFloat16:
      return unit_rows_of<Float16>(job, begin, end);
  }
}

static void unit_rows_gradient(const UnitRows& job, int64_t begin, int64_t end) {
  switch (job.type) {
    case FeatureType::kFloat32:
      return unit_rows_gradient_of<Float32>(job, begin, end);
    case FeatureType::kBFloat16:
      return unit_rows_gradient_of<BFloat16>(job, begin, end);
    case FeatureType::kFloat16:
      return unit_rows_gradient_of<Float16>(job, begin, end);
  }
}
