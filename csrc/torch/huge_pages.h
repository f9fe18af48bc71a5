// Large outputs are written once, to memory that the system has not mapped yet: with pages of 4 KB, mapping it takes
// several times as long as computing what goes there.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sslk {

// Asks for huge pages below the data of a tensor; without effect on what is mapped, and where there are none.
inline void prefer_huge_pages(const torch::stable::Tensor& t) {
#if defined(__linux__)
  const uintptr_t page = uintptr_t{2} << 20, begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t end = (begin + t.numel() * t.element_size()) / page * page;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

}  // namespace sslk
