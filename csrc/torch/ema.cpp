// Lists of CPU tensors in, the torch-free kernel underneath, torch's own thread pool across all of their elements.
#include "../cpu/ema.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "../checks.h"

using torch::stable::Tensor;

namespace {

std::string name_of(const char* list, size_t index) { return std::string(list) + "[" + std::to_string(index) + "]"; }

sslk::FeatureType check_entry(const Tensor& t, const char* list, size_t index, const Tensor& target) {
  STD_TORCH_CHECK(t.is_cpu(), name_of(list, index), ": expected a CPU tensor");
  STD_TORCH_CHECK(t.is_contiguous(), name_of(list, index), ": expected a contiguous tensor");
  STD_TORCH_CHECK(t.sizes().equals(target.sizes()), name_of(list, index), ": expected the shape of ",
                  name_of("targets", index));
  return sslk::feature_type(t, list);
}

struct Range {
  const char *begin, *end;
  const char* list;
  size_t index;
  bool written;
};

// Elements are updated in any order: what is written must be neither written nor read as another element.
void check_apart(std::vector<Range> ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  const Range *written = nullptr, *read = nullptr;  // of those so far, the ones that reach farthest
  for (const Range& range : ranges) {
    for (const Range* other : {written, range.written ? read : nullptr}) {
      STD_TORCH_CHECK(!other || other->end <= range.begin, name_of(range.list, range.index),
                      ": expected memory of its own, got an overlap with ", name_of(other->list, other->index));
    }
    const Range*& farthest = range.written ? written : read;
    if (!farthest || farthest->end < range.end) farthest = &range;
  }
}

void ema_update_cpu(std::vector<Tensor> targets, std::vector<Tensor> sources, std::vector<Tensor> copies,
                    double momentum) {
  STD_TORCH_CHECK(sources.size() == targets.size(), "sources: expected ", targets.size(), " tensors, got ",
                  sources.size());
  STD_TORCH_CHECK(copies.size() <= targets.size(), "copies: expected at most ", targets.size(), " tensors, got ",
                  copies.size());
  STD_TORCH_CHECK(momentum >= 0 && momentum <= 1, "momentum: expected a number in [0, 1], got ", momentum);

  std::vector<sslk::EmaTensor> tensors;
  std::vector<Range> ranges;
  for (size_t i = 0; i < targets.size(); ++i) {
    sslk::EmaTensor t{};
    t.size = targets[i].numel();
    const auto claim = [&](const Tensor& tensor, const void* data, const char* list, bool written) {
      const char* begin = static_cast<const char*>(data);
      if (t.size > 0) ranges.push_back({begin, begin + t.size * tensor.element_size(), list, i, written});
    };
    t.target_type = check_entry(targets[i], "targets", i, targets[i]);
    t.source_type = check_entry(sources[i], "sources", i, targets[i]);
    t.target = targets[i].mutable_data_ptr();
    t.source = sources[i].const_data_ptr();
    claim(targets[i], t.target, "targets", true);
    const bool is_target = t.source == t.target && t.source_type == t.target_type;  // stays what it is
    if (!is_target) claim(sources[i], t.source, "sources", false);
    if (i < copies.size()) {
      t.copy_type = check_entry(copies[i], "copies", i, targets[i]);
      t.copy = copies[i].mutable_data_ptr();
      claim(copies[i], t.copy, "copies", true);
    }
    tensors.push_back(t);
  }
  check_apart(std::move(ranges));

  const sslk::Ema ema(std::move(tensors), momentum);
  const sslk::Isa isa = sslk::active_isa();
  const int64_t elements_per_task = 65536;  // about 20 us of work, so that small models stay on one thread
  torch::stable::parallel_for(0, ema.blocks(), elements_per_task / sslk::Ema::kBlock,
                              [&](int64_t begin, int64_t end) { ema.update(begin, end, isa); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m) {
  m.def("ema_update_(Tensor(a!)[] targets, Tensor[] sources, Tensor(b!)[] copies, float momentum) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) { m.impl("ema_update_", TORCH_BOX(&ema_update_cpu)); }
