// y = silu(GroupNorm(x) * weight + bias), written behind num_halo frames; the first num_copies of those get copies of
// y's first frame. Backward, their gradients belong to that frame.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/video.h"

namespace cogvx::group_norm_silu {

struct Args {
  DType dtype, weight_dtype;
  int64_t num_groups, num_halo, num_copies;  // num_copies is 0 or num_halo
  double eps;
  Video x, y;           // T and num_halo + T frames
  char *weight, *bias;  // [C]
  Video grad, grad_x;   // backward alone: of y, of x
  char *grad_weight, *grad_bias;  // [C] of the arithmetic type
  bool in_double;                 // whether that of float32 is double, too
};

#define COGVX_DECLARE(isa)                          \
  namespace isa {                                   \
  void forward(const Args& args, int num_threads);  \
  void backward(const Args& args, int num_threads); \
  }
COGVX_EACH_ISA(COGVX_DECLARE)
#undef COGVX_DECLARE

}  // namespace cogvx::group_norm_silu
