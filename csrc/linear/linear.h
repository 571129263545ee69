// c[m, n] = f(y[m, n]), y[m, n] = the sum over k of a[m, k] * b[n, k], plus bias[n], where f is GELU in its tanh form
// or nothing; or, on the way back through GELU, grad[m, n] times its slope at y[m, n].
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/place.h"

namespace cogvx::linear {

// A matrix of any strides, in elements; `outer` is from one row or column of the result to the next, `inner` along k.
struct Matrix {
  char* data;
  int64_t outer, inner;
};

struct Args {
  DType dtype;  // of every tensor
  int64_t m, n, k;
  Matrix a, b;
  char* bias;  // [N], or nullptr
  bool gelu;
  char* grad;    // [M, N], dense, or nullptr
  char* c;       // [M, N], dense
  char* packed;  // room for b as the kernel reads it, packed_bytes
};

#define COGVX_DECLARE(isa)                              \
  namespace isa {                                       \
  void packed_bytes(const Args& args, int64_t* bytes); \
  void multiply(const Args& args, int num_threads);    \
  }
COGVX_EACH_ISA(COGVX_DECLARE)
#undef COGVX_DECLARE

}  // namespace cogvx::linear
