// Runs CUDA kernels on the CPU, for tests: one block after the other, one fibre for each thread of a block.
//
// A fibre runs until its thread exits or comes to a barrier or a warp operation, and goes on when all that must take
// part have come; where nobody can go on, the launch fails and says who waits for whom. A seed shuffles the order of
// blocks and, between barriers, that of threads. Shared memory is NaN when a block begins. races.cpp watches memory.
//
// Stricter than a GPU on purpose: a thread that has exited counts as missing at a barrier and in a mask, and all must
// come to a barrier at the same line. Blocks never run beside each other: races.cpp is for what they could do to each
// other if they did. A kernel that fails ends its launch with cudaErrorLaunchFailure, of which cudaGetErrorString then
// gives the reason; nothing is thrown across the host code under test.
#include "emulator.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_emulation {

uint3 thread_index, block_index;
dim3 block_size, grid_size;
Fiber* running = nullptr;
uint32_t epoch = 0;

namespace {

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 4 << 10;
constexpr size_t kMaxSharedBytes = 48 << 10, kMaxParameterBytes = 4 << 10;

std::vector<std::unique_ptr<Fiber>> fibers;  // of this and earlier launches: only the first `threads` are in use
char* stacks = nullptr;                      // one arena, so that an address is quickly known to be on a stack
unsigned threads = 0;
ucontext_t scheduler;
[[maybe_unused]] void* scheduler_asan_stack = nullptr;
[[maybe_unused]] const void* scheduler_stack = nullptr;
[[maybe_unused]] size_t scheduler_stack_bytes = 0;

const std::function<void()>* thread_body = nullptr;
const void* kernel_address = nullptr;
std::vector<SharedVariable> shared_variables;  // of the launch; the first is the dynamic one
std::string failure;                           // of the launch
std::string last_message, unread_failure;
cudaError_t last_error = cudaSuccess;
uint64_t launches = 0;
uint32_t seed = 0;
std::mt19937 random_order;

void enter_fiber(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler_asan_stack, fiber.context.uc_stack.ss_sp, fiber.context.uc_stack.ss_size);
#endif
  swapcontext(&scheduler, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler_asan_stack, nullptr, nullptr);
#endif
}

void leave_fiber(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&fiber.asan_stack, scheduler_stack, scheduler_stack_bytes);
#endif
  swapcontext(&fiber.context, &scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber.asan_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

// A fibre outlives its thread: it runs that of the next block, for a new context costs more than most threads.
void run_fiber() noexcept {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  for (;;) {
    (*thread_body)();
    running->state = Fiber::kExited;
    leave_fiber(*running);
  }
}

void prepare_fiber(unsigned thread) {
  if (!stacks) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* arena = mmap(nullptr, kMaxThreads * kStackBytes, PROT_NONE, flags, -1, 0);
    if (arena == MAP_FAILED) {
      std::perror("mmap of the threads' stacks");
      std::abort();
    }
    stacks = static_cast<char*>(arena);
  }
  char* stack = stacks + thread * kStackBytes + kGuardBytes;
  const size_t bytes = kStackBytes - kGuardBytes;
  mprotect(stack, bytes, PROT_READ | PROT_WRITE);
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(stack, bytes);  // an abandoned fibre leaves its frames behind
#endif
  Fiber& fiber = *fibers[thread];
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}

void resume(Fiber& fiber) {
  running = &fiber;
  thread_index = unflatten(fiber.thread, block_size);
  thread_goes_on();
  enter_fiber(fiber);
  running = nullptr;
}

void wait(Fiber::State state, const char* name, Site site) {
  Fiber& fiber = *running;
  fiber.state = state;
  fiber.name = name;
  fiber.site = site;
  leave_fiber(fiber);
}

uint64_t warp_operation(Fiber::Operation operation, const char* name, unsigned mask, uint64_t value, int source,
                        Site site) {
  Fiber& fiber = *running;
  if (!(mask >> lane() & 1)) fail(format("%s with mask %#x, in which its own lane %d is not", name, mask, lane()));
  fiber.operation = operation;
  fiber.mask = mask;
  fiber.value = value;
  fiber.source = source;
  wait(Fiber::kAtWarpOperation, name, site);
  return fiber.value;
}

// The kernel's name is in the symbol table of the object that holds it; kernels are not exported.
std::string kernel_name() {
  Dl_info info;
  if (!dladdr(kernel_address, &info)) return "kernel";
  std::ifstream stream(info.dli_fname, std::ios::binary);
  const std::string file((std::istreambuf_iterator<char>(stream)), {});
  if (file.size() < sizeof(Elf64_Ehdr)) return "kernel";
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(file.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(file.data() + header->e_shoff);
  const uint64_t wanted = static_cast<const char*>(kernel_address) - static_cast<const char*>(info.dli_fbase);
  for (unsigned i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(file.data() + sections[i].sh_offset);
    const char* names = file.data() + sections[sections[i].sh_link].sh_offset;
    for (uint64_t s = 0; s < sections[i].sh_size / sizeof(Elf64_Sym); ++s) {
      if (symbols[s].st_value != wanted || ELF64_ST_TYPE(symbols[s].st_info) != STT_FUNC) continue;
      std::unique_ptr<char, void (*)(void*)> demangled(
          abi::__cxa_demangle(names + symbols[s].st_name, nullptr, nullptr, nullptr), std::free);
      return demangled ? demangled.get() : names + symbols[s].st_name;
    }
  }
  return "kernel";
}

void set_failure(const Fiber& fiber, const std::string& message) {
  failure = kernel_name() + ": block " + triple(block_index) + ", thread " +
            triple(unflatten(fiber.thread, block_size)) + ": " + message;
}

std::string where(const Fiber& fiber) {
  return format("%s (%s:%d)", fiber.name, fiber.site.file, fiber.site.line);
}

bool same_site(const Fiber& a, const Fiber& b) { return a.site.line == b.site.line && a.site.file == b.site.file; }

// The thread that keeps this one waiting, or null.
const Fiber* missing_for(const Fiber& fiber) {
  if (fiber.state == Fiber::kAtBarrier) {
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers[i]->state != Fiber::kAtBarrier || !same_site(*fibers[i], fiber)) return fibers[i].get();
    }
    return nullptr;
  }
  const unsigned first = fiber.thread / kWarp * kWarp;
  for (unsigned lane = 0; lane < kWarp && first + lane < threads; ++lane) {
    const Fiber& other = *fibers[first + lane];
    if (!(fiber.mask >> lane & 1)) continue;
    if (other.state != Fiber::kAtWarpOperation || !same_site(other, fiber) || other.name != fiber.name ||
        other.mask != fiber.mask) {
      return &other;
    }
  }
  return nullptr;
}

void finish_warp_operation(Fiber& leader) {
  std::vector<Fiber*> lanes;
  const unsigned first = leader.thread / kWarp * kWarp;
  for (unsigned lane = 0; lane < kWarp && first + lane < threads; ++lane) {
    if (leader.mask >> lane & 1) lanes.push_back(fibers[first + lane].get());
  }
  if (leader.operation == Fiber::kBallot) {
    uint64_t votes = 0;
    for (const Fiber* fiber : lanes) votes |= fiber->value << fiber->thread % kWarp;
    for (Fiber* fiber : lanes) fiber->value = votes;
  } else if (leader.operation == Fiber::kShuffle) {
    std::vector<uint64_t> results;
    for (const Fiber* fiber : lanes) {
      const auto source = std::find_if(lanes.begin(), lanes.end(), [&](const Fiber* other) {
        return int(other->thread % kWarp) == fiber->source;
      });
      if (source == lanes.end()) {
        set_failure(*fiber, format("%s with mask %#x reads lane %d, which takes no part", where(*fiber).c_str(),
                                   fiber->mask, fiber->source));
        return;
      }
      results.push_back((*source)->value);
    }
    for (size_t i = 0; i < lanes.size(); ++i) lanes[i]->value = results[i];
  } else {
    uint32_t seen[kWarp] = {};
    for (const Fiber* fiber : lanes) {
      for (unsigned lane = 0; lane < kWarp; ++lane) seen[lane] = std::max(seen[lane], fiber->seen[lane]);
    }
    for (Fiber* fiber : lanes) {
      std::copy(std::begin(seen), std::end(seen), fiber->seen);
      ++fiber->seen[fiber->thread % kWarp];
    }
  }
  for (Fiber* fiber : lanes) fiber->state = Fiber::kReady;
}

// Lets go those who have waited for each other; an error if there are none.
void release() {
  const Fiber* waiting = nullptr;
  bool released = false;
  for (unsigned i = 0; i < threads && failure.empty(); ++i) {
    Fiber& fiber = *fibers[i];
    if (fiber.state != Fiber::kAtBarrier && fiber.state != Fiber::kAtWarpOperation) continue;
    waiting = &fiber;
    if (missing_for(fiber)) continue;
    released = true;
    if (fiber.state == Fiber::kAtWarpOperation) {
      finish_warp_operation(fiber);
      continue;
    }
    for (unsigned t = 0; t < threads; ++t) fibers[t]->state = Fiber::kReady;
    ++epoch;
    return;
  }
  if (released || !waiting) return;
  const Fiber& other = *missing_for(*waiting);
  std::string reason = other.state == Fiber::kExited ? "it has exited" : "it waits at " + where(other);
  if (other.state == Fiber::kAtWarpOperation) reason += format(" with mask %#x", other.mask);
  std::string what = where(*waiting);
  if (waiting->state == Fiber::kAtWarpOperation) what += format(" with mask %#x", waiting->mask);
  set_failure(*waiting, "waits at " + what + ", which thread " + triple(unflatten(other.thread, block_size)) +
                            " never reaches: " + reason);
}

void fill_shared(SharedVariable& variable) {
  std::memset(variable.begin, 0xff, variable.bytes);
  forget_accesses(variable.begin, variable.bytes);
  variable.filled = true;
}

void run_block() {
  for (SharedVariable& variable : shared_variables) variable.filled = false;
  fill_shared(shared_variables.front());
  epoch = 0;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.state = Fiber::kReady;
    fiber.thread = i;
    std::fill(std::begin(fiber.seen), std::end(fiber.seen), 0);
    fiber.seen[i % kWarp] = 1;
  }
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  for (bool alive = true; alive && failure.empty();) {
    if (seed) std::shuffle(order.begin(), order.end(), random_order);
    for (unsigned i : order) {
      if (fibers[i]->state == Fiber::kReady) resume(*fibers[i]);
      if (!failure.empty()) return;
    }
    release();
    alive = std::any_of(fibers.begin(), fibers.begin() + threads,
                        [](const auto& fiber) { return fiber->state != Fiber::kExited; });
  }
}

cudaError_t report(cudaError_t error, const std::string& message) {
  last_error = error;
  last_message = unread_failure = message;
  return error;
}

std::string check(const cudaLaunchConfig_t& config) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return "gridDim: expected 1 to 2147483647, 65535 and 65535 blocks, got " + triple({grid.x, grid.y, grid.z});
  }
  if (!block.x || !block.y || !block.z || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      block.x * block.y * block.z > kMaxThreads) {
    return "blockDim: expected 1 to 1024 threads, at most 64 along z, got " + triple({block.x, block.y, block.z});
  }
  if (config.dynamicSmemBytes > kMaxSharedBytes) {
    return format("dynamicSmemBytes: expected at most %zu, got %zu", kMaxSharedBytes, config.dynamicSmemBytes);
  }
  if (config.numAttrs) return format("numAttrs: expected 0, got %u", config.numAttrs);
  return "";
}

}  // namespace

std::string format(const char* pattern, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

std::string triple(uint3 v) { return format("(%u, %u, %u)", v.x, v.y, v.z); }

uint3 unflatten(uint64_t number, dim3 size) {
  const uint64_t row = number / size.x;
  return {unsigned(number % size.x), unsigned(row % size.y), unsigned(row / size.y)};
}

uint64_t block_number() {
  return block_index.x + uint64_t(grid_size.x) * (block_index.y + uint64_t(grid_size.y) * block_index.z);
}

void fail(const std::string& message) {
  set_failure(*running, message);
  leave_fiber(*running);  // for good: the launch ends
  std::abort();
}

bool on_a_stack(const void* address) {
  return address >= stacks && address < stacks + kMaxThreads * kStackBytes;
}

const SharedVariable* shared_variable(const void* address) {
  for (const SharedVariable& variable : shared_variables) {
    if (address >= variable.begin && address < variable.begin + variable.bytes) return &variable;
  }
  return nullptr;
}

int lane() { return int(running->thread % kWarp); }

void sync_threads(Site site) { wait(Fiber::kAtBarrier, "__syncthreads", site); }

void sync_warp(unsigned mask, Site site) { warp_operation(Fiber::kSync, "__syncwarp", mask, 0, 0, site); }

uint64_t shuffle(const char* name, unsigned mask, uint64_t bits, int source, Site site) {
  return warp_operation(Fiber::kShuffle, name, mask, bits, source, site);
}

unsigned ballot(const char* name, unsigned mask, bool predicate, Site site) {
  return unsigned(warp_operation(Fiber::kBallot, name, mask, predicate, 0, site));
}

void declare_shared(void* begin, size_t bytes, const char* name) {
  size_t total = bytes;
  for (SharedVariable& variable : shared_variables) {
    if (variable.begin == begin) {
      if (!variable.filled) fill_shared(variable);
      return;
    }
    total += variable.bytes;
  }
  if (total > kMaxSharedBytes) fail(format("%s: expected at most %zu bytes of shared memory", name, kMaxSharedBytes));
  shared_variables.push_back({static_cast<char*>(begin), bytes, name, false});
  fill_shared(shared_variables.back());
}

void* dynamic_shared() { return shared_variables.front().begin; }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, size_t parameter_bytes,
                   const std::function<void()>& run_thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  kernel_address = kernel;
  const std::string refusal = check(config);
  if (!refusal.empty()) return report(cudaErrorInvalidConfiguration, kernel_name() + ": " + refusal);
  if (parameter_bytes > kMaxParameterBytes) {
    return report(cudaErrorInvalidValue, kernel_name() + format(": expected at most %zu bytes of parameters, got %zu",
                                                                kMaxParameterBytes, parameter_bytes));
  }
  ++launches;
  grid_size = config.gridDim;
  block_size = config.blockDim;
  threads = block_size.x * block_size.y * block_size.z;
  thread_body = &run_thread;
  while (fibers.size() < threads) {
    fibers.push_back(std::make_unique<Fiber>());
    prepare_fiber(unsigned(fibers.size()) - 1);
  }
  const std::unique_ptr<char, void (*)(void*)> dynamic(static_cast<char*>(std::malloc(config.dynamicSmemBytes)),
                                                       std::free);
  shared_variables.assign(1, {dynamic.get(), config.dynamicSmemBytes, "dynamic", false});

  std::vector<uint64_t> order(uint64_t(grid_size.x) * grid_size.y * grid_size.z);
  std::iota(order.begin(), order.end(), uint64_t(0));
  if (seed) std::shuffle(order.begin(), order.end(), random_order);
  for (uint64_t block : order) {
    block_index = unflatten(block, grid_size);
    run_block();
    if (!failure.empty()) break;
  }
  forget_accesses();
  shared_variables.clear();
  if (failure.empty()) return cudaSuccess;
  for (unsigned i = 0; i < fibers.size(); ++i) prepare_fiber(i);  // some are in the midst of a kernel
  return report(cudaErrorLaunchFailure, std::exchange(failure, std::string()));
}

}  // namespace cuda_emulation

using namespace cuda_emulation;

namespace {

// Threads change only where they wait: what stands between two of those is atomic.
template <typename T>
T add(T* address, T value) {
  watch_atomic(address, sizeof(T));
  const T old = *address;
  *address = old + value;
  return old;
}

}  // namespace

int atomicAdd(int* address, int value) { return add(address, value); }
unsigned atomicAdd(unsigned* address, unsigned value) { return add(address, value); }
unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) { return add(address, value); }
float atomicAdd(float* address, float value) { return add(address, value); }
void __threadfence() {}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : last_message.c_str(); }

// For Python.
#define SSLK_EXPORT extern "C" __attribute__((visibility("default")))

// 0 is the order of the indices; any other number shuffles blocks and threads, the same way each time it is set.
SSLK_EXPORT void cuda_emulation_seed(uint32_t value) {
  seed = value;
  random_order.seed(value);
}

SSLK_EXPORT uint64_t cuda_emulation_launches() { return launches; }

// What the latest failed launch said, once; empty if none has failed since.
SSLK_EXPORT const char* cuda_emulation_failure() {
  static std::string message;
  message = std::exchange(unread_failure, std::string());
  return message.c_str();
}
