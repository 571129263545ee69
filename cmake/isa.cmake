# COGVX_ISAS: the instruction sets for which every csrc/*/cpu.cpp is compiled, and COGVX_FLAGS_<isa> for each.
# The flags are exactly the processor features that csrc/common/isa.h checks before it chooses a variant.

include(CheckCXXCompilerFlag)
include(CheckCXXSourceCompiles)

set(COGVX_ISAS generic)
set(COGVX_FLAGS_generic "")
set(COGVX_DEFINITIONS "")

# Loops marked `omp simd` may then reorder a sum; it needs no OpenMP library.
check_cxx_compiler_flag(-fopenmp-simd COGVX_HAS_OPENMP_SIMD)
if(COGVX_HAS_OPENMP_SIMD)
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fopenmp-simd>)
elseif(NOT MSVC)
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Wno-unknown-pragmas>)
endif()

if(COGVX_ISA)
  set(COGVX_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(COGVX_FLAGS_avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  set(COGVX_FLAGS_avx512bf16 ${COGVX_FLAGS_avx512} -mavx512bf16)
  string(JOIN " " CMAKE_REQUIRED_FLAGS ${COGVX_FLAGS_avx512bf16})
  check_cxx_source_compiles("
    #if !defined(__x86_64__)
    #error only x86 has these
    #endif
    int main() { return __builtin_cpu_supports(\"avx512bf16\") ? 0 : 1; }" COGVX_HAS_X86_VARIANTS)
  unset(CMAKE_REQUIRED_FLAGS)
  if(COGVX_HAS_X86_VARIANTS)
    list(APPEND COGVX_ISAS avx2 avx512 avx512bf16)
    list(APPEND COGVX_DEFINITIONS COGVX_X86_VARIANTS)
  endif()
endif()
message(STATUS "cogvx: CPU kernels for ${COGVX_ISAS}")
