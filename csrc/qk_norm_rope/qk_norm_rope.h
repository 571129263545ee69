// From rows [q | k | v] of all heads to q, k and v [B, A, N, E]: q and k normalized over E, then turned in vision rows.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/place.h"

namespace cogvx::qk_norm_rope {

// Tokens that one thread takes at a time, and whose gradients of weights are summed together. It does not depend on the
// machine or the number of threads, and so neither do the gradients.
constexpr int kChunk = 16;

// A [B, A, N, E] tensor whose rows of E are contiguous; strides in elements.
struct Heads {
  char* data;
  int64_t stride_b, stride_a, stride_n;
};

struct Args {
  DType dtype;  // of every tensor but cos and sin, which are of the arithmetic type, and what is double here
  int64_t batch, num_rows, num_text, num_heads, width;  // B, N, of them text, A, E
  double eps;
  Rows qkv;                  // [B, N, 3 A E]
  char *weight[2], *bias[2];  // [E], of q and of k
  char *cos, *sin;           // [N - num_text, E], or both null: nothing turns
  Heads y[3];                // q, k, v: forward alone; the rest backward alone
  Heads grad[3];             // of q, k, v
  Rows grad_qkv;
  char *grad_weight[2], *grad_bias[2];
  double *grad_cos, *grad_sin;  // [N - num_text, E], or null where nobody wants them
  double* partials;             // [chunks, 2, 2, E]: for q and k, the sums of grad * xhat and of grad over a chunk
};

#define COGVX_DECLARE(isa)                          \
  namespace isa {                                   \
  void forward(const Args& args, int num_threads);  \
  void backward(const Args& args, int num_threads); \
  }
COGVX_EACH_ISA(COGVX_DECLARE)
#undef COGVX_DECLARE

}  // namespace cogvx::qk_norm_rope
