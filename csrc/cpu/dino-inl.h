// DINO's cross-entropy of the student's crops under the teacher's, one sample at a time.
//
// The teacher's probabilities p_t and their sum stay in scratch memory of the size of the second-level cache. Crop v of
// the student meets q_v, the sum of its teachers' probabilities of mass n_v, once:
//
//   z = (S - max S) / tau,   e = exp(z)                    one exponential to an element
//   loss = n log(sum e) - sum q z                          both terms are >= 0: nothing cancels
//   gradient = n e / sum e - q                             by z, when the sum is known, from e in scratch memory

#include "logits-inl.h"

// Scratch memory of one row, of one number to each of its blocks, and of a double.
struct Row {
  float* values;
  float* of_block;
  float* mass;
};

SSLK_INLINE Row scratch_row(float* scratch, int64_t width, int64_t i) {
  float* values = scratch + i * (width + blocks_of(width) + 2);
  return {values, values + width, values + width + blocks_of(width)};
}

// What fill_target left in a row.
SSLK_INLINE Target target_in(const Row& row) {
  Target target = {row.values, row.of_block, 0};
  std::memcpy(&target.mass, row.mass, sizeof target.mass);
  return target;
}

// Fills a row with body(col, count) and its masses, and returns it as a target.
template <typename Body>
SSLK_INLINE Target fill_target(const Row& row, int64_t width, Body body) {
  double mass = 0;
  for_each_block(width, [&](int64_t block, int64_t first, int64_t cols) __attribute__((always_inline)) {
    Vec total = {};
    for_each_vector(cols, [&](int64_t at, int count) __attribute__((always_inline)) {
      Vec q = body(block, first + at, count);
      store_features<Float32>(row.values + first + at, q, count);
      total += lanes_below(count, q);
    });
    row.of_block[block] = float(sum(total));
    mass += sum(total);
  });
  std::memcpy(row.mass, &mass, sizeof mass);
  return target_in(row);
}

template <typename Type>
static void teacher_target(const Dino& job, const typename Type::Element* teacher, const Row& row) {
  if (job.teacher_probs) {
    fill_target(row, job.width, [&](int64_t, int64_t col, int count) __attribute__((always_inline)) {
      return load_features<Type>(teacher + col, count);
    });
    return;
  }
  const Logits<Type> logits = {teacher, job.center};
  const Peak peak = exponentials<true, false>(logits, job.width, job.teacher_scale, row.values, row.of_block, {});
  fill_target(row, job.width, [&](int64_t block, int64_t col, int count) __attribute__((always_inline)) {
    const double factor = factor_from(peak, row.of_block[block], job.teacher_scale) / peak.total;
    return load_features<Float32>(row.values + col, count) * float(factor);
  });
}

// The sum of the first n rows of scratch memory but one (or of all, for `except` outside of them); they are at least two.
static Target sum_targets(float* scratch, int64_t n, int64_t except, int64_t width, const Row& row) {
  return fill_target(row, width, [&](int64_t, int64_t col, int count) __attribute__((always_inline)) {
    Vec total = {};
    for (int64_t t = 0; t < n; ++t) {
      if (t != except) total += load_features<Float32>(scratch_row(scratch, width, t).values + col, count);
    }
    return total;
  });
}

SSLK_INLINE bool can_stream(const float* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Vec) == 0; }
SSLK_INLINE bool can_stream(const uint16_t*) { return false; }
SSLK_INLINE void stream(uint16_t*, Vec) {}

// The loss of a row, and its gradient unless that is null.
template <typename Type>
static double student_row(const Dino& job, const typename Type::Element* student, const Target& target, float weight,
                          typename Type::Element* gradient, const Row& row) {
  const Logits<Type> logits = {student, nullptr};
  const float scale = job.student_scale;
  Peak peak;
  if (gradient) {
    peak = exponentials<true, true>(logits, job.width, scale, row.values, row.of_block, target);
    const double unit = double(job.gradient_scale) * weight;
    const Vec theirs = broadcast(float(unit));
    const bool streams = job.stream_gradient && can_stream(gradient);
    for_each_block(job.width, [&](int64_t block, int64_t first, int64_t cols) __attribute__((always_inline)) {
      const double factor = factor_from(peak, row.of_block[block], scale) / peak.total;
      const Vec ours = broadcast(float(unit * target.mass * factor));
      for_each_vector(cols, [&](int64_t at, int count) __attribute__((always_inline)) {
        const int64_t col = first + at;
        Vec e = load_features<Float32>(row.values + col, count), q = load_features<Float32>(target.q + col, count);
        Vec g = e * ours - q * theirs;
        if (streams && count == LANES) {
          stream(gradient + col, g);
        } else {
          store_features<Type>(gradient + col, g, count);
        }
      });
    });
  } else {
    peak = exponentials<false, true>(logits, job.width, scale, nullptr, nullptr, target);
  }
  return target.mass * std::log(peak.total) - peak.weighted;
}

template <typename Student, typename Teacher>
static void dino_samples(const Dino& job, int64_t begin, int64_t end, float* scratch, float* teacher_sum) {
  typedef typename Student::Element StudentElement;
  typedef typename Teacher::Element TeacherElement;
  const int64_t width = job.width, n = job.n_teachers;
  const Row all = scratch_row(scratch, width, n), others = scratch_row(scratch, width, n + 1);
  const Row exponentials = scratch_row(scratch, width, n + 2);
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t t = 0; t < n; ++t) {
      const Crop& crop = job.teachers[t];
      const TeacherElement* teacher = static_cast<const TeacherElement*>(crop.data) + b * crop.stride;
      teacher_target<Teacher>(job, teacher, scratch_row(scratch, width, t));
      if (teacher_sum) {
        for_each_vector(width, [&](int64_t col, int count) __attribute__((always_inline)) {
          Vec sum = load_features<Float32>(teacher_sum + col, count) + load_features<Teacher>(teacher + col, count);
          store_features<Float32>(teacher_sum + col, sum, count);
        });
      }
    }
    const Target everything = n == 1 ? target_in(scratch_row(scratch, width, 0)) : sum_targets(scratch, n, -1, width, all);
    const float weight = job.weights ? job.weights[b] : 1;
    double loss = 0;
    for (int64_t v = 0; v < job.n_students; ++v) {
      const Crop& crop = job.students[v];
      const StudentElement* student = static_cast<const StudentElement*>(crop.data) + b * crop.stride;
      StudentElement* gradient =
          job.gradient ? static_cast<StudentElement*>(job.gradient) + (v * job.samples + b) * width : nullptr;
      const bool own = job.distinct && v < n;
      if (own && n == 1) {  // no teacher but its own
        if (gradient) std::memset(gradient, 0, width * sizeof *gradient);
        continue;
      }
      const Target target = !own     ? everything
                            : n == 2 ? target_in(scratch_row(scratch, width, 1 - v))
                                     : sum_targets(scratch, n, v, width, others);
      loss += student_row<Student>(job, student, target, weight, gradient, exponentials);
    }
    job.losses[b] = float(loss * weight);
  }
  fence();
}

template <typename Student>
static void dino_student(const Dino& job, int64_t begin, int64_t end, float* scratch, float* teacher_sum) {
  switch (job.teacher_type) {
    case FeatureType::kFloat32:
      return dino_samples<Student, Float32>(job, begin, end, scratch, teacher_sum);
    case FeatureType::kBFloat16:
      return dino_samples<Student, BFloat16>(job, begin, end, scratch, teacher_sum);
    case FeatureType::kFloat16:
      return dino_samples<Student, Float16>(job, begin, end, scratch, teacher_sum);
  }
}

static void dino_rows(const Dino& job, int64_t begin, int64_t end, float* scratch, float* teacher_sum) {
  switch (job.student_type) {
    case FeatureType::kFloat32:
      return dino_student<Float32>(job, begin, end, scratch, teacher_sum);
    case FeatureType::kBFloat16:
      return dino_student<BFloat16>(job, begin, end, scratch, teacher_sum);
    case FeatureType::kFloat16:
      return dino_student<Float16>(job, begin, end, scratch, teacher_sum);
  }
}
