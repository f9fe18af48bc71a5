// u = z / n, rounded to the type of z, with n = max(|z|, eps), and g -> (g - u (u . g)) / n, or g / eps where |z| is less
// than eps; in fp32.

template <typename Type>
static void unit_rows_of(const UnitRows& job, int64_t begin, int64_t end) {
  typedef typename Type::Element Element;
  for (int64_t row = begin; row < end; ++row) {
    const Element* z = static_cast<const Element*>(job.z) + row * job.stride;
    float* unit = job.unit + row * job.width;
    const float norm = norm_of_row(job.width, [&](int64_t col, int count) __attribute__((always_inline)) {
      return load_features<Type>(z + col, count);
    });
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
      radial = sum_of_row(job.width, [&](int64_t col, int count) __attribute__((always_inline)) {
        return load_features<Type>(z + col, count) / divisor * load_features<Float32>(upstream + col, count);
      });
    }
    for_each_vector(job.width, [&](int64_t col, int count) __attribute__((always_inline)) {
      const Vec u = load_features<Type>(z + col, count) / divisor, g = load_features<Float32>(upstream + col, count);
      store_features<Type>(gradient + col, (g - u * float(radial)) / divisor, count);
    });
  }
}

static void unit_rows(const UnitRows& job, int64_t begin, int64_t end) {
  with_type(job.type, [&](auto type) { unit_rows_of<decltype(type)>(job, begin, end); });
}

static void unit_rows_gradient(const UnitRows& job, int64_t begin, int64_t end) {
  with_type(job.type, [&](auto type) { unit_rows_gradient_of<decltype(type)>(job, begin, end); });
}
