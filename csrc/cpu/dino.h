// The kernels of self-distillation: DINO's cross-entropy with its gradient, and the steps of Sinkhorn-Knopp.
// Free of torch and of Python.
#pragma once

#include <cstdint>

#include "half.h"
#include "isa.h"

namespace sslk {

// Logits of one crop, one row of `width` numbers to a sample.
struct Crop {
  const void* data;
  int64_t stride;  // between rows, in elements
};

struct Dino {
  const Crop* students;
  int64_t n_students;
  FeatureType student_type;
  const Crop* teachers;
  int64_t n_teachers;
  FeatureType teacher_type;
  int64_t width;
  const float* center;   // [width], or null
  const float* weights;  // one to a sample, or null
  float student_scale;   // 1 / temperature
  float teacher_scale;
  bool distinct;       // leave out pairs of the same crop
  bool teacher_probs;  // the teacher's rows are probabilities already
  float* losses;       // one to a sample
  void* gradient;      // [n_students, samples, width] in the student's type, or null
  bool stream_gradient;  // past the caches, where it is larger than they are
  int64_t samples;
  float gradient_scale;  // factor on the gradient by logits / temperature
};

// Floats of scratch memory that dino_rows needs: each teacher's probabilities, their sum, the sum without one of them
// and a student's exponentials, with a number to each block, of which none has fewer than 512 columns, and two more.
// It is at most INT64_MAX, as many as no machine has.
inline int64_t dino_scratch(const Dino& job) {
  int64_t floats;
  const bool fits = !__builtin_mul_overflow(job.n_teachers + 3, job.width + job.width / 512 + 3, &floats);
  return fits ? floats : INT64_MAX;
}

// Samples [begin, end); distinct ranges may run concurrently, each with a scratch memory of its own. The teacher's
// logits of these samples are added to `teacher_sum` [width] unless that is null.
void dino_rows(const Dino& job, int64_t begin, int64_t end, float* scratch, float* teacher_sum, Isa isa);

}  // namespace sslk
