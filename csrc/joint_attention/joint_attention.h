// y[b, n, a] = softmax over m of (q[b, a, n] . k[b, a, m] / sqrt(E)) times v[b, a, m], for n and m of one sample.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace cogvx::joint_attention {

// A [B, A, N, E] view, its rows of E contiguous; strides in elements.
struct Heads {
  char* data;
  int64_t stride_b, stride_a, stride_n;
};

// Consecutive tokens that see one another.
struct Sample {
  int64_t first, count;
};

struct Args {
  DType dtype;  // of every tensor
  int64_t batch, num_heads, num_tokens, width;
  const Sample* samples;  // they follow one another and make up the tokens
  int64_t num_samples;
  Heads q, k, v;
  Heads y;                       // forward alone; the rest backward alone
  Heads grad;                    // of y
  Heads grad_q, grad_k, grad_v;
};

#define COGVX_DECLARE(isa)                          \
  namespace isa {                                   \
  void forward(const Args& args, int num_threads);  \
  void backward(const Args& args, int num_threads); \
  }
COGVX_EACH_ISA(COGVX_DECLARE)
#undef COGVX_DECLARE

}  // namespace cogvx::joint_attention
