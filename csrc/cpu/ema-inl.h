// Elements of one tensor, `weight` of the way from what they are towards those of another; computed in float.

template <typename To, typename From>
static void move(void* to, const void* from, int64_t begin, int64_t end, float weight) {
  typename To::Element* target = static_cast<typename To::Element*>(to) + begin;
  const typename From::Element* source = static_cast<const typename From::Element*>(from) + begin;
  if (weight == 1) {
    for_each_vector(end - begin, [&](int64_t at, int count) __attribute__((always_inline)) {
      store_features<To>(target + at, load_features<From>(source + at, count), count);
    });
  } else if (weight != 0) {
    for_each_vector(end - begin, [&](int64_t at, int count) __attribute__((always_inline)) {
      const Vec old = load_features<To>(target + at, count), goal = load_features<From>(source + at, count);
      const Vec moved = old + weight * (goal - old);
      store_features<To>(target + at, goal == old ? old : moved, count);  // infinities that agree stay
    });
  }
}

template <typename To>
static void move_from(FeatureType type, void* to, const void* from, int64_t begin, int64_t end, float weight) {
  switch (type) {
    case FeatureType::kFloat32:
      return move<To, Float32>(to, from, begin, end, weight);
    case FeatureType::kBFloat16:
      return move<To, BFloat16>(to, from, begin, end, weight);
    case FeatureType::kFloat16:
      return move<To, Float16>(to, from, begin, end, weight);
  }
}

static void move_towards(FeatureType to_type, void* to, FeatureType from_type, const void* from, int64_t begin,
                         int64_t end, float weight) {
  switch (to_type) {
    case FeatureType::kFloat32:
      return move_from<Float32>(from_type, to, from, begin, end, weight);
    case FeatureType::kBFloat16:
      return move_from<BFloat16>(from_type, to, from, begin, end, weight);
    case FeatureType::kFloat16:
      return move_from<Float16>(from_type, to, from, begin, end, weight);
  }
}

static void ema_update(const EmaTensor& t, int64_t begin, int64_t end, float weight) {
  const int64_t run = t.copy ? 1024 : end - begin;  // a copy is made while its original is in the first cache
  for (; begin < end; begin += run) {
    const int64_t stop = end - begin < run ? end : begin + run;
    move_towards(t.target_type, t.target, t.source_type, t.source, begin, stop, weight);
    if (t.copy) move_towards(t.copy_type, t.copy, t.target_type, t.target, begin, stop, 1);
  }
}
