// From rows [q | k | v] of all heads to q, k and v [B, A, N, E]: q and k normalized over E, then turned in vision rows.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/place.h"

namespace cogvx::qk_norm_rope {

// Tokens that one thread, or on a GPU one block, takes at a time, and whose gradients of weights are summed together. It
// does not depend on the machine or the number of threads, and so neither do the gradients.
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
  // Forward alone, of 16-bit types: what turns, its products with cos and sin and their sums are rounded to the type,
  // and on a GPU cos and sin are of it.
  bool rounded;
  Heads y[3];                // q, k, v: forward alone; the rest backward alone
  Heads grad[3];             // of q, k, v
  Rows grad_qkv;
  char *grad_weight[2], *grad_bias[2];  // on a GPU these follow from the partials
  // [N - num_text, E] of double, or null where nobody wants them; on a GPU [B, 2, N - num_text, E] of float, of which
  // the sum over samples and over q and k is wanted.
  char *grad_cos, *grad_sin;
  // For q and k, the sums of grad * xhat and of grad over a chunk: [chunks, 2, 2, E], on a GPU [B, chunks, 2, 2, E].
  double* partials;
};

#define COGVX_DECLARE(isa)                          \
  namespace isa {                                   \
  void forward(const Args& args, int num_threads);  \
  void backward(const Args& args, int num_threads); \
  }
COGVX_EACH_ISA(COGVX_DECLARE)
#undef COGVX_DECLARE

// Return nullptr, or what went wrong.
const char* forward_cuda(const Args& args, int device, uintptr_t stream);
const char* backward_cuda(const Args& args, int device, uintptr_t stream);

}  // namespace cogvx::qk_norm_rope
