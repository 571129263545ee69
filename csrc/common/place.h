// Where tensors are and where a kernel runs, as Python hands it over: addresses and numbers, nothing of torch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

namespace cogvx {

// The rows of a [B, N, D] tensor, each of them contiguous; strides in elements.
struct Rows {
  char* data;
  int64_t stride_b, stride_n;
};

struct Place {
  bool is_cuda;
  int threads;       // on a CPU
  int device;        // on a GPU
  uintptr_t stream;  // on a GPU
};

using PyRows = std::tuple<uintptr_t, int64_t, int64_t>;       // address, strides
using PyPlace = std::tuple<bool, int, int, uintptr_t>;        // in the order of Place

inline char* pointer(uintptr_t address) { return reinterpret_cast<char*>(address); }

inline Rows rows(const PyRows& from) {
  return {pointer(std::get<0>(from)), std::get<1>(from), std::get<2>(from)};
}

inline Place place(const PyPlace& from) {
  return {std::get<0>(from), std::get<1>(from), std::get<2>(from), std::get<3>(from)};
}

// A CUDA launcher returns nullptr, or what went wrong.
inline void throw_if(const char* error, const char* operator_name) {
  if (error) throw std::runtime_error(std::string(operator_name) + ": CUDA error: " + error);
}

// Runs a CUDA launcher, where there are any.
#ifdef COGVX_CUDA_VERSION
#define COGVX_ON_CUDA(operator_name, call) cogvx::throw_if(call, operator_name)
#else
#define COGVX_ON_CUDA(operator_name, call)                                                         \
  do {                                                                                            \
    if constexpr (false) (void)(call); /* discarded, so that it needs no definition, but checked */ \
    throw std::runtime_error(std::string(operator_name) + ": the extension was built without CUDA"); \
  } while (false)
#endif

}  // namespace cogvx
