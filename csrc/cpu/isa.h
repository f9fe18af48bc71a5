// Instruction sets that the kernels are compiled for, and the choice among them at run time.
#pragma once

#include <string>
#include <vector>

#if defined(__x86_64__) && !defined(SSLK_PORTABLE)
#define SSLK_X86 1
#else
#define SSLK_X86 0
#endif

namespace sslk {

// In rising order of vector width. kBaseline is SSE2 on x86-64, NEON on Arm, plain C++ elsewhere.
enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

const char* isa_name(Isa isa);

// What this build contains and this processor runs, in rising order; never empty.
std::vector<Isa> available_isas();

// Throws std::invalid_argument when `name` is unknown or not available here.
Isa parse_isa(const std::string& name);

// The widest available set, or the one that the environment variable SSL_KERNELS_ISA names. Read once.
Isa active_isa();

// "intel", "amd", or "unknown" where the processor does not tell.
const char* cpu_vendor();

}  // namespace sslk
