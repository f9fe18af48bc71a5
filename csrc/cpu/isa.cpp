#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace sslk {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kBaseline:
      break;
  }
  return "baseline";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas{Isa::kBaseline};
#if SSLK_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    isas.push_back(Isa::kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      isas.push_back(Isa::kAvx512);
    }
  }
#endif
  return isas;
}

Isa parse_isa(const std::string& name) {
  std::string known;
  for (Isa isa : available_isas()) {
    if (name == isa_name(isa)) return isa;
    known += known.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
  }
  throw std::invalid_argument("instruction set: got '" + name + "', expected one of: " + known);
}

Isa active_isa() {
  static const Isa isa = [] {
    const char* name = std::getenv("SSL_KERNELS_ISA");
    return name && *name ? parse_isa(name) : available_isas().back();
  }();
  return isa;
}

const char* cpu_vendor() {
#if SSLK_X86
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel")) return "intel";
  if (__builtin_cpu_is("amd")) return "amd";
#endif
  return "unknown";
}

}  // namespace sslk
