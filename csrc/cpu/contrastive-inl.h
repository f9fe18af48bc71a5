// out = factor * sums, rounded to the type of the features last.

template <typename Type>
static void finish_rows(const Gradient& g, int64_t begin, int64_t end) {
  typedef typename Type::Element Element;
  Element* out = static_cast<Element*>(g.out);
  if (g.col_stride == 1) {
    for (int64_t row = begin; row < end; ++row) {
      const float* sums = g.sums + row * g.row_stride;
      for_each_vector(g.width, [&](int64_t col, int count) __attribute__((always_inline)) {
        store_features<Type>(out + row * g.width + col, load_features<Float32>(sums + col, count) * g.factor, count);
      });
    }
    return;
  }
  // The sums are transposed: vectors of a row are gathered from a block of columns that stays in the first cache.
  const int64_t block = 64;
  for (int64_t first = 0; first < g.width; first += block) {
    const int64_t cols = g.width - first < block ? g.width - first : block;
    for (int64_t row = begin; row < end; ++row) {
      const float* sums = g.sums + row * g.row_stride + first * g.col_stride;
      for_each_vector(cols, [&](int64_t col, int count) __attribute__((always_inline)) {
        Vec v = {};
        for (int k = 0; k < count; ++k) v[k] = sums[(col + k) * g.col_stride];
        store_features<Type>(out + row * g.width + first + col, v * g.factor, count);
      });
    }
  }
}

static void finish_gradient(const Gradient& gradient, int64_t begin, int64_t end) {
  switch (gradient.type) {
    case FeatureType::kFloat32:
      return finish_rows<Float32>(gradient, begin, end);
    case FeatureType::kBFloat16:
      return finish_rows<BFloat16>(gradient, begin, end);
    case FeatureType::kFloat16:
      return finish_rows<Float16>(gradient, begin, end);
  }
}
