// The kernel that moves a list of tensors towards another. Free of torch and of Python.
#pragma once

#include <cstdint>
#include <vector>

#include "half.h"
#include "isa.h"

namespace sslk {

struct EmaTensor {
  void* target;
  FeatureType target_type;
  const void* source;
  FeatureType source_type;
  void* copy;  // receives the new target, or null
  FeatureType copy_type;
  int64_t size;  // elements of each
};

// target <- momentum target + (1 - momentum) source, in float. A momentum of 1 keeps every bit of the targets, and one
// of 0 takes the sources whatever the targets are.
class Ema {
 public:
  Ema(std::vector<EmaTensor> tensors, double momentum);

  // All tensors' elements, one tensor after the other: the unit of work, so that a list of thousands of small tensors
  // and one of a single large tensor are shared out alike.
  int64_t blocks() const { return first_block.back(); }

  // Distinct ranges of blocks may run concurrently.
  void update(int64_t block_begin, int64_t block_end, Isa isa) const;

  static constexpr int64_t kBlock = 64;  // elements: whole vectors, and whole cache lines

 private:
  std::vector<EmaTensor> tensors;
  std::vector<int64_t> first_block;  // of each tensor, and behind the last
  float weight;                      // of the sources
};

}  // namespace sslk
