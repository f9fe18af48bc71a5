// Watches the memory of a kernel for data races, reads of shared memory that nobody wrote, and misaligned accesses.
//
// g++ announces every access to memory through the functions below: -fsanitize=thread calls those of ThreadSanitizer,
// of which only the names are used here, not its library, and -fsanitize=alignment calls one when an address does not
// suit the type. For each byte the latest write, two atomic ones and two reads are kept. Two accesses of which one is a
// write race unless they are of one thread, or both atomic, or ordered: within a block by __syncthreads, within a warp
// by __syncwarp. A shuffle orders no memory, and blocks of one launch are never ordered. It is found whatever order the
// threads happened to run in. A thread that spins on memory, for a block that will never run beside it, is ended.
#include "emulator.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <unordered_map>

namespace cuda_emulation {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr bool kWatching = false;  // one sanitizer excludes the other
#else
constexpr bool kWatching = true;
#endif

struct Access {
  uint32_t block;  // from 1; 0 is none
  uint16_t thread;
  uint32_t epoch, clock;
};

struct Cell {
  Access write, atomic, other_atomic, read, other_read;
};

constexpr uintptr_t kPageBytes = 4096;
constexpr uint64_t kMaxAccesses = 1'000'000;
struct Page {
  Cell cells[kPageBytes] = {};
};
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t recent_number = 0;
uint64_t accesses_left = 0;  // of the thread, until it waits
Page* recent = nullptr;

Cell& cell_of(uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  if (!recent || number != recent_number) {
    std::unique_ptr<Page>& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    recent = page.get();
    recent_number = number;
  }
  return recent->cells[address % kPageBytes];
}

bool in_one_warp(const Access& a, const Access& b) {
  return a.block == b.block && a.thread / kWarp == b.thread / kWarp;
}

bool is_ordered(const Access& earlier, const Access& now) {
  if (earlier.block == 0) return true;
  if (earlier.block != now.block) return false;
  if (earlier.thread == now.thread || earlier.epoch < now.epoch) return true;
  return in_one_warp(earlier, now) && running->seen[earlier.thread % kWarp] >= earlier.clock;
}

// Two that nothing orders are enough to catch whoever races with a third, if they are of two warps where any are: what
// is ordered after both has passed a barrier.
void remember(Access& first, Access& second, const Access& now) {
  if (is_ordered(first, now)) {
    first = now;
  } else if (second.block == 0 || in_one_warp(first, second) || !in_one_warp(first, now)) {
    second = now;
  }
}

std::string describe(const void* address, size_t bytes) {
  if (const SharedVariable* variable = shared_variable(address)) {
    return format("%zu bytes at offset %zd of the shared variable %s", bytes,
                  static_cast<const char*>(address) - variable->begin, variable->name);
  }
  return format("%zu bytes of global memory at %p", bytes, address);
}

[[noreturn]] void fail_race(const Access& other, const char* did, const char* does, const void* address, size_t bytes) {
  const uint3 block = unflatten(other.block - 1, grid_size);
  fail(std::string(does) + " " + describe(address, bytes) + ", which thread " +
       triple(unflatten(other.thread, block_size)) + " of block " + triple(block) + " " + did +
       ", and nothing orders the two");
}

void watch(const void* address, size_t bytes, bool is_write, bool atomic) {
  if (!kWatching || !running || on_a_stack(address)) return;
  const Access now{uint32_t(block_number()) + 1, uint16_t(running->thread), epoch,
                   running->seen[running->thread % kWarp]};
  const char* does = is_write ? "writes" : "reads";
  if (accesses_left-- == 0) {
    fail("runs on and on without a wait, and now " + std::string(does) + " " + describe(address, bytes));
  }
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = cell_of(reinterpret_cast<uintptr_t>(address) + i);
    for (const Access* other : {&cell.write, atomic ? nullptr : &cell.atomic, atomic ? nullptr : &cell.other_atomic}) {
      if (other && !is_ordered(*other, now)) fail_race(*other, "wrote", does, address, bytes);
    }
    for (const Access* other : {&cell.read, &cell.other_read}) {
      if (is_write && !is_ordered(*other, now)) fail_race(*other, "read", does, address, bytes);
    }
    if (atomic) {
      remember(cell.atomic, cell.other_atomic, now);
    } else if (is_write) {
      cell = {now, {}, {}, {}, {}};
    } else {
      if (cell.write.block == 0 && cell.atomic.block == 0 && shared_variable(address)) {
        fail("reads " + describe(address, bytes) + ", of which nobody has written byte " + std::to_string(i));
      }
      remember(cell.read, cell.other_read, now);
    }
  }
}

}  // namespace

void thread_goes_on() { accesses_left = kMaxAccesses; }

void watch_atomic(const void* address, size_t bytes) { watch(address, bytes, true, true); }

void forget_accesses(const void* begin, size_t bytes) {
  if (!kWatching) return;
  for (size_t i = 0; i < bytes; ++i) cell_of(reinterpret_cast<uintptr_t>(begin) + i) = {};
}

void forget_accesses() {
  pages.clear();
  recent = nullptr;
}

}  // namespace cuda_emulation

using cuda_emulation::watch;

extern "C" {

#define SSLK_ACCESS(bytes)                                                             \
  void __tsan_read##bytes(void* address) { watch(address, bytes, false, false); }      \
  void __tsan_write##bytes(void* address) { watch(address, bytes, true, false); }
#define SSLK_UNALIGNED_ACCESS(bytes)                                                          \
  void __tsan_unaligned_read##bytes(void* address) { watch(address, bytes, false, false); }   \
  void __tsan_unaligned_write##bytes(void* address) { watch(address, bytes, true, false); }
SSLK_ACCESS(1)
SSLK_ACCESS(2)
SSLK_ACCESS(4)
SSLK_ACCESS(8)
SSLK_ACCESS(16)
SSLK_UNALIGNED_ACCESS(2)
SSLK_UNALIGNED_ACCESS(4)
SSLK_UNALIGNED_ACCESS(8)
SSLK_UNALIGNED_ACCESS(16)
void __tsan_read_range(void* address, size_t bytes) { watch(address, bytes, false, false); }
void __tsan_write_range(void* address, size_t bytes) { watch(address, bytes, true, false); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}

// Host code counts references and guards its static variables with these.
#define SSLK_ATOMIC(bits, T)                                                                        \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); } \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) {    \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);  \
  }                                                                                                 \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T v, int, int) {      \
    return __atomic_compare_exchange_n(p, expected, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);   \
  }
SSLK_ATOMIC(8, uint8_t)
SSLK_ATOMIC(32, uint32_t)
SSLK_ATOMIC(64, uint64_t)

// As g++ and clang lay them out for UndefinedBehaviorSanitizer.
struct MismatchedType {
  uint16_t kind, info;
  char name[1];
};
struct Mismatch {
  const char* file;
  uint32_t line, column;
  const MismatchedType* type;
  unsigned char log2_alignment, check;
};

void __ubsan_handle_type_mismatch_v1(const Mismatch* mismatch, const void* address) {
  const std::string message = cuda_emulation::format(
      "%s:%u: expected an address that is a multiple of %u for %s, got %p", mismatch->file, mismatch->line,
      1u << mismatch->log2_alignment, mismatch->type->name, address);
  if (cuda_emulation::running) cuda_emulation::fail(message);
  std::fprintf(stderr, "%s\n", message.c_str());
  std::abort();
}
}
