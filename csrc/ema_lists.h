// Checks of the tensors that an exponential moving average takes, on whichever device they are.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/ema.h"

namespace sslk {

inline std::string name_of(const char* list, size_t index) {
  return std::string(list) + "[" + std::to_string(index) + "]";
}

struct Range {
  const char *begin, *end;
  const char* list;
  size_t index;
  bool written;
};

// Elements are updated in any order: what is written must be neither written nor read as another element.
inline void check_apart(std::vector<Range> ranges) {
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

template <typename Tensor>
bool has_shape_of(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t axis = 0; same && axis < a.dim(); ++axis) same = a.size(axis) == b.size(axis);
  return same;
}

// The entries of the lists. is_here(t) tells whether a tensor is on the device, which `expected` describes.
template <typename Tensor, typename IsHere>
std::vector<EmaTensor> ema_tensors(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
                                   const std::vector<Tensor>& copies, IsHere is_here, const char* expected) {
  STD_TORCH_CHECK(sources.size() == targets.size(), "sources: expected ", targets.size(), " tensors, got ",
                  sources.size());
  STD_TORCH_CHECK(copies.size() <= targets.size(), "copies: expected at most ", targets.size(), " tensors, got ",
                  copies.size());

  std::vector<EmaTensor> tensors;
  std::vector<Range> ranges;
  for (size_t i = 0; i < targets.size(); ++i) {
    EmaTensor t{};
    t.size = targets[i].numel();
    const auto check = [&](const Tensor& tensor, const char* list) {
      STD_TORCH_CHECK(is_here(tensor), name_of(list, i), ": expected ", expected);
      STD_TORCH_CHECK(tensor.is_contiguous(), name_of(list, i), ": expected a contiguous tensor");
      STD_TORCH_CHECK(has_shape_of(tensor, targets[i]), name_of(list, i), ": expected the shape of ",
                      name_of("targets", i));
      return feature_type(tensor, list);
    };
    const auto claim = [&](FeatureType type, const void* data, const char* list, bool written) {
      const char* begin = static_cast<const char*>(data);
      if (t.size > 0) ranges.push_back({begin, begin + t.size * item_size(type), list, i, written});
    };
    t.target_type = check(targets[i], "targets");
    t.source_type = check(sources[i], "sources");
    t.target = targets[i].mutable_data_ptr();
    t.source = sources[i].const_data_ptr();
    claim(t.target_type, t.target, "targets", true);
    const bool is_target = t.source == t.target && t.source_type == t.target_type;  // stays what it is
    if (!is_target) claim(t.source_type, t.source, "sources", false);
    if (i < copies.size()) {
      t.copy_type = check(copies[i], "copies");
      t.copy = copies[i].mutable_data_ptr();
      claim(t.copy_type, t.copy, "copies", true);
    }
    tensors.push_back(t);
  }
  check_apart(std::move(ranges));
  return tensors;
}

}  // namespace sslk
