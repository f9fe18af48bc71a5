// The kernel that writes keys into a ring buffer. Free of torch and of Python.
#pragma once

#include <cstdint>

#include "half.h"
#include "isa.h"

namespace sslk {

struct Enqueue {
  void* queue;            // [size, width]
  FeatureType queue_type;
  int64_t size;
  int64_t queue_stride;   // between rows, in elements; likewise below
  const void* keys;       // [batch, width]
  FeatureType keys_type;
  int64_t keys_stride;
  int64_t width;
  int64_t start;          // row of the queue that key 0 goes to, if it is not overwritten by a later one
  bool normalize;         // divide each key by max(its norm, 1e-12)
};

// Keys [begin, end) go to rows (start + key) mod size. At most `size` keys may be written by one and the same batch;
// distinct ranges of these may run concurrently.
void enqueue_rows(const Enqueue& job, int64_t begin, int64_t end, Isa isa);

}  // namespace sslk
