#include "ema.h"

#include <algorithm>
#include <utility>

#define SSLK_KERNEL "ema-inl.h"
#include "foreach_isa.h"

namespace sslk {

Ema::Ema(std::vector<EmaTensor> tensors, double momentum)
    : tensors(std::move(tensors)), first_block{0}, weight(static_cast<float>(1 - momentum)) {
  for (const EmaTensor& t : this->tensors) first_block.push_back(first_block.back() + (t.size + kBlock - 1) / kBlock);
}

static void update_elements(const EmaTensor& t, int64_t begin, int64_t end, float weight, Isa isa) {
  SSLK_DISPATCH(isa, ema_update, t, begin, end, weight);
}

void Ema::update(int64_t block_begin, int64_t block_end, Isa isa) const {
  size_t index = std::upper_bound(first_block.begin(), first_block.end(), block_begin) - first_block.begin() - 1;
  for (; index < tensors.size() && first_block[index] < block_end; ++index) {
    const int64_t begin = std::max<int64_t>(block_begin - first_block[index], 0) * kBlock;
    const int64_t end = std::min((block_end - first_block[index]) * kBlock, tensors[index].size);
    update_elements(tensors[index], begin, end, weight, isa);
  }
}

}  // namespace sslk
