// Work split over torch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../cpu/isa.h"

namespace sslk {

// Rows, or columns, of so many elements that are about 10 us of work, so that small batches stay on one thread.
inline int64_t grain(int64_t length) { return 16384 / (length > 0 ? length : 1) + 1; }

// Calls body(begin, end, isa) for ranges of the rows.
template <typename Body>
void over_rows(int64_t rows, int64_t width, Body body) {
  const Isa isa = active_isa();
  torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) { body(begin, end, isa); });
}

}  // namespace sslk
