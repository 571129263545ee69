// y = silu(GroupNorm(x; weight, bias) * scale + shift), written behind num_halo frames as in group_norm_silu; scale =
// weight_y z + bias_y and shift = weight_b z + bias_b are those of the latent pixel that nearest resizing finds.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/video.h"

namespace cogvx::spatial_norm_silu {

struct Args {
  DType dtype, weight_dtype;
  int64_t num_groups, num_halo, num_copies;  // num_copies is 0 or num_halo
  double eps;
  Video x, y;           // T and num_halo + T frames
  int64_t width;        // of x's frames
  char *weight, *bias;  // [C]
  Video z;              // in the memory order of x
  int64_t latent_height, latent_width;
  // Frame, row and column of x from which on each latent frame, row and column is the nearest; one entry more than
  // those, the size of x.
  const int64_t *first_frame, *first_row, *first_column;
  char *weight_y, *bias_y, *weight_b, *bias_b;  // [C, C_z], [C], [C, C_z], [C]
  Video grad, grad_x;  // backward alone: of y, of x; the rest of the arithmetic type:
  bool in_double;                  // whether that of float32 is double, too
  char *grad_weight, *grad_bias;   // [C]
  Video grad_scale, grad_shift;    // [B, C, T_z, H_z, W_z]
};

#define COGVX_DECLARE(isa)                          \
  namespace isa {                                   \
  void forward(const Args& args, int num_threads);  \
  void backward(const Args& args, int num_threads); \
  }
COGVX_EACH_ISA(COGVX_DECLARE)
#undef COGVX_DECLARE

}  // namespace cogvx::spatial_norm_silu
