// y[b, n, a] = softmax over m of (q[b, a, n] . k[b, a, m] / sqrt(E)) times v[b, a, m], for n and m of one sample.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/place.h"

namespace cogvx::joint_attention {

// A [B, A, N, E] view, its rows of E contiguous; strides in elements.
struct Heads {
  char* data;
  int64_t stride_b, stride_a, stride_n;
};

using PyHeads = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, strides

inline Heads heads(const PyHeads& from) {
  return {pointer(std::get<0>(from)), std::get<1>(from), std::get<2>(from), std::get<3>(from)};
}

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
  Heads y;                       // of the forward pass
  char* lse;                     // [B, A, N] in what a dtype is summed in, or nullptr; of the forward pass
  Heads grad;                    // of y; this and the rest are of the backward pass
  Heads grad_q, grad_k, grad_v;
  const char* grad_lse;          // like lse

  // For CUDA, instead of samples: [num_tiles, 3], the first row of a tile, of its sample, and the row after the sample;
  // nullptr where all tokens see one another.
  const int* tiles;
  int64_t num_tiles;
  float* statistics;  // [B, A, N, 4] of rows of scores: peak, share of a weight of 1, delta, nothing; for the gradient
};

#define COGVX_DECLARE(isa)                          \
  namespace isa {                                   \
  void forward(const Args& args, int num_threads);  \
  void backward(const Args& args, int num_threads); \
  }
COGVX_EACH_ISA(COGVX_DECLARE)
#undef COGVX_DECLARE

constexpr int kOwned = 128;  // rows of one of `tiles`

// Return nullptr, or what went wrong. They take float16 and bfloat16, widths that are multiples of 8 up to 128, rows
// that begin at multiples of 16 bytes.
const char* forward_cuda(const Args& args, int device, uintptr_t stream);
const char* backward_cuda(const Args& args, int device, uintptr_t stream);

}  // namespace cogvx::joint_attention
