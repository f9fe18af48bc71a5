// What the emulator's own files share.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <string>

namespace cuda_emulation {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kWarp = 32;

// One thread of the block that runs.
struct Fiber {
  enum State { kReady, kAtBarrier, kAtWarpOperation, kExited };
  enum Operation { kSync, kShuffle, kBallot };

  ucontext_t context;
  void* asan_stack = nullptr;
  State state = kExited;
  unsigned thread = 0;
  // Where it waits, for what and with what.
  const char* name = nullptr;
  Site site{};
  Operation operation = kSync;
  unsigned mask = 0;
  int source = 0;
  uint64_t value = 0;
  // Clock of each lane of its warp as far as __syncwarp has told this one; its own counts its __syncwarps.
  uint32_t seen[kWarp] = {};
};

extern Fiber* running;  // null outside of kernels
extern uint32_t epoch;  // barriers that the block has passed
uint64_t block_number();

uint3 unflatten(uint64_t number, dim3 size);
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string triple(uint3 v);

// Ends the launch with an error about the thread that runs.
[[noreturn]] void fail(const std::string& message);

bool on_a_stack(const void* address);
struct SharedVariable {
  char* begin;
  size_t bytes;
  const char* name;
  bool filled;  // with NaN, in this block
};
const SharedVariable* shared_variable(const void* address);

// Of races.cpp.
void thread_goes_on();
void watch_atomic(const void* address, size_t bytes);
void forget_accesses(const void* begin, size_t bytes);
void forget_accesses();

}  // namespace cuda_emulation
