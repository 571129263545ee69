// y = (LayerNorm(x) * weight + bias) * (1 + scale[:, m]) + shift[:, m]; m = 0 for the first `num_text` rows, 1 after.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/place.h"

#ifdef __CUDACC__
#define COGVX_HOST_DEVICE __host__ __device__
#else
#define COGVX_HOST_DEVICE
#endif

namespace cogvx::expert_layernorm {

// Rows of the backward pass whose sums are kept together. It does not depend on the machine or the number of threads,
// and so neither do the gradients.
constexpr int kChunk = 32;
constexpr int64_t kColumns = 64;  // that one task adds up: a cache line or more of every chunk's sums
// Rows up to this width are worked on in double on CPUs: of so few values, what is left after the mean and the slope
// are taken out can be as small as the rounding of float.
constexpr int64_t kNarrow = 8;

struct Args {
  DType dtype;  // of every tensor but `partials`
  int64_t batch, num_rows, width, num_text;
  double eps;
  Rows x;            // [B, N, D]
  char *weight, *bias;   // [D]
  Rows shift, scale;     // [B, 2, D]
  Rows y;                // [B, N, D], forward alone; the rest backward alone
  Rows grad, grad_x;     // [B, N, D]
  char *grad_weight, *grad_bias;  // [D]
  Rows grad_shift, grad_scale;    // [B, 2, D]
  char* partials;  // [B, chunks, 2, D] of the arithmetic type: sums of grad and of grad * xhat over each chunk's rows
};

// Consecutive rows of one sample that share a modulation.
struct Chunk {
  int64_t b, first, last;  // rows first <= n < last
  int m;                   // 0 text, 1 vision
};

COGVX_HOST_DEVICE static inline int64_t num_chunks(int64_t rows, int64_t size) { return (rows + size - 1) / size; }

COGVX_HOST_DEVICE static inline int64_t num_chunks(const Args& args, int64_t size) {  // of a sample; text first
  return num_chunks(args.num_text, size) + num_chunks(args.num_rows - args.num_text, size);
}

COGVX_HOST_DEVICE static inline Chunk chunk_at(const Args& args, int64_t index, int64_t size) {
  const int64_t per_sample = num_chunks(args, size), num_text_chunks = num_chunks(args.num_text, size);
  const int64_t in_sample = index % per_sample;
  const bool is_text = in_sample < num_text_chunks;
  const int64_t end = is_text ? args.num_text : args.num_rows;
  const int64_t first = is_text ? in_sample * size : args.num_text + (in_sample - num_text_chunks) * size;
  return {index / per_sample, first, first + size < end ? first + size : end, is_text ? 0 : 1};
}

#define COGVX_DECLARE(isa)                                    \
  namespace isa {                                             \
  void forward(const Args& args, int num_threads);            \
  void backward(const Args& args, int num_threads);           \
  }
COGVX_EACH_ISA(COGVX_DECLARE)
#undef COGVX_DECLARE

// Return nullptr, or what went wrong.
const char* forward_cuda(const Args& args, int device, uintptr_t stream);
const char* backward_cuda(const Args& args, int device, uintptr_t stream);

}  // namespace cogvx::expert_layernorm
