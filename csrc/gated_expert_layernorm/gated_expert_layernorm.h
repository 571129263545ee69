// x_new = x + gate[:, m] * y; normed = expert_layernorm(x_new); m = 0 for the first `num_text` rows, 1 after.
#pragma once

#include "expert_layernorm/expert_layernorm.h"

namespace cogvx::gated_expert_layernorm {

using expert_layernorm::Chunk;
using expert_layernorm::chunk_at;
using expert_layernorm::kChunk;
using expert_layernorm::kColumns;
using expert_layernorm::num_chunks;

struct Args {
  expert_layernorm::Args norm;  // of x_new: its `y` is normed, its `grad` that of normed, its `grad_x` also x's here
  Rows x, y;                    // [B, N, D]
  Rows gate;                    // [B, 2, D]
  Rows x_new;                   // [B, N, D], forward alone; the rest backward alone
  Rows grad_x_new, grad_y;      // [B, N, D]
  Rows grad_gate;               // [B, 2, D]
  char* gate_partials;          // [B, chunks, D] of the arithmetic type: sums of grad_x * y over each chunk's rows
};

#define COGVX_DECLARE(isa)                         \
  namespace isa {                                  \
  void forward(const Args& args, int num_threads);  \
  void backward(const Args& args, int num_threads); \
  }
COGVX_EACH_ISA(COGVX_DECLARE)
#undef COGVX_DECLARE

// Return nullptr, or what went wrong.
const char* forward_cuda(const Args& args, int device, uintptr_t stream);
const char* backward_cuda(const Args& args, int device, uintptr_t stream);

}  // namespace cogvx::gated_expert_layernorm
