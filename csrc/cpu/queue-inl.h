// Rows of keys into rows of a queue: normalised in fp32, converted between float, bfloat16 and half, or copied.

template <typename Queue, typename Keys>
static void enqueue(const Enqueue& job, int64_t begin, int64_t end) {
  typedef typename Queue::Element QueueElement;
  typedef typename Keys::Element KeyElement;
  for (int64_t key = begin; key < end; ++key) {
    const KeyElement* from = static_cast<const KeyElement*>(job.keys) + key * job.keys_stride;
    QueueElement* to = static_cast<QueueElement*>(job.queue) + (job.start + key) % job.size * job.queue_stride;
    if (job.queue_type == job.keys_type && !job.normalize) {
      std::memcpy(to, from, job.width * sizeof(QueueElement));
      continue;
    }
    Vec norm = broadcast(1);
    if (job.normalize) {
      Vec squares = {};
      for_each_vector(job.width, [&](int64_t col, int count) __attribute__((always_inline)) {
        Vec v = load_features<Keys>(from + col, count);
        squares += v * v;
      });
      norm = max_nan(broadcast(std::sqrt(float(sum(squares)))), 1e-12f);
    }
    for_each_vector(job.width, [&](int64_t col, int count) __attribute__((always_inline)) {
      store_features<Queue>(to + col, load_features<Keys>(from + col, count) / norm, count);
    });
  }
}

template <typename Queue>
static void enqueue_into(const Enqueue& job, int64_t begin, int64_t end) {
  switch (job.keys_type) {
    case FeatureType::kFloat32:
      return enqueue<Queue, Float32>(job, begin, end);
    case FeatureType::kBFloat16:
      return enqueue<Queue, BFloat16>(job, begin, end);
    case FeatureType::kFloat16:
      return enqueue<Queue, Float16>(job, begin, end);
  }
}

static void enqueue_rows(const Enqueue& job, int64_t begin, int64_t end) {
  switch (job.queue_type) {
    case FeatureType::kFloat32:
      return enqueue_into<Float32>(job, begin, end);
    case FeatureType::kBFloat16:
      return enqueue_into<BFloat16>(job, begin, end);
    case FeatureType::kFloat16:
      return enqueue_into<Float16>(job, begin, end);
  }
}
