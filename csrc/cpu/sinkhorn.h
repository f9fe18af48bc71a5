// The passes of Sinkhorn-Knopp over logits [rows, width], and the softmax that it ends with. Free of torch and Python.
#pragma once

#include <cstdint>

#include "half.h"
#include "isa.h"

namespace sslk {

struct Sinkhorn {
  const void* logits;
  FeatureType type;
  int64_t rows;
  int64_t width;
  int64_t stride;       // between rows, in elements
  const float* center;  // [width], or null
  float scale;          // 1 / temperature
};

// Floats of scratch memory that the following need, to each of the threads that run them on ranges of their own.
inline int64_t sinkhorn_scratch(const Sinkhorn& job) { return 3 * job.width; }

// Of each column of [begin, end): the maximum m, and the sum of exp(scale (y - m)). The centre is not used. With `more`
// they go on from those of rows before.
void sinkhorn_column_lse(const Sinkhorn& job, int64_t begin, int64_t end, float* maxima, float* totals, bool more, Isa isa);

// Adds softmax_k(scale (y - center)) of rows [begin, end) to `sums` [width].
void sinkhorn_column_sums(const Sinkhorn& job, int64_t begin, int64_t end, float* scratch, float* sums, Isa isa);

// Writes softmax_k(scale (y - center)) of rows [begin, end) to the same rows of `out` [rows, width].
void centered_softmax(const Sinkhorn& job, int64_t begin, int64_t end, float* scratch, float* out, Isa isa);

}  // namespace sslk
