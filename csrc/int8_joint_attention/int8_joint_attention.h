// y = softmax(q' k'^T / sqrt(E)) v: q' is q and k' is k less its mean, rounded to int8 by groups of tokens.
#pragma once

#include "joint_attention/joint_attention.h"

namespace cogvx::int8_joint_attention {

constexpr int kQueries = 128, kKeys = 64;  // tokens that share a scale

struct Args : joint_attention::Args {
  const float* mean;           // [B, A, E], of the tokens of k
  int8_t *q8, *k8;             // [B, A, N, row_bytes]: rows end in zeros
  float *q_scales, *k_scales;  // [B, A, groups]
};

// Bytes of a row of q8 and k8.
inline int64_t row_bytes(int64_t width) { return width <= 64 ? 64 : 128; }

// Returns nullptr, or what went wrong. It takes what joint_attention takes on CUDA, without samples.
const char* forward_cuda(const Args& args, int device, uintptr_t stream);

}  // namespace cogvx::int8_joint_attention
