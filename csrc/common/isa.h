// Which of the compiled variants of the CPU kernels runs on this processor.
//
// Every csrc/<op>/cpu.cpp is compiled once for each instruction set, inside a namespace of its name: `generic` on any
// machine, and on x86 `avx2`, `avx512` and `avx512bf16` (cmake/isa.cmake has their flags). The environment variable COGVX_CPU_ISA
// lowers the choice, to compare variants.
#pragma once

#include <cstdlib>
#include <string>
#include <vector>

#ifdef COGVX_X86_VARIANTS
#define COGVX_EACH_ISA(declare) declare(generic) declare(avx2) declare(avx512) declare(avx512bf16)
#define COGVX_ON_THIS_CPU(call)                             \
  do {                                                      \
    switch (cogvx::chosen_isa()) {                          \
      case cogvx::Isa::avx512bf16: avx512bf16::call; break; \
      case cogvx::Isa::avx512: avx512::call; break;         \
      case cogvx::Isa::avx2: avx2::call; break;             \
      default: generic::call;                               \
    }                                                       \
  } while (false)
#else
#define COGVX_EACH_ISA(declare) declare(generic)
#define COGVX_ON_THIS_CPU(call) generic::call
#endif

namespace cogvx {

enum class Isa { generic, avx2, avx512, avx512bf16 };

inline const std::vector<std::string>& isa_names() {  // as compiled, in the order of Isa
#ifdef COGVX_X86_VARIANTS
  static const std::vector<std::string> names{"generic", "avx2", "avx512", "avx512bf16"};
#else
  static const std::vector<std::string> names{"generic"};
#endif
  return names;
}

inline Isa best_isa() {
#ifdef COGVX_X86_VARIANTS
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return Isa::generic;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Isa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
#else
  return Isa::generic;
#endif
}

inline Isa chosen_isa() {
  static const Isa chosen = [] {
    const char* asked = std::getenv("COGVX_CPU_ISA");
    const Isa best = best_isa();
    for (int i = 0; asked && i < static_cast<int>(best); ++i)
      if (isa_names()[i] == asked) return static_cast<Isa>(i);
    return best;
  }();
  return chosen;
}

}  // namespace cogvx
