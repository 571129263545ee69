// y = silu(GroupNorm(x; weight, bias) * scale + shift), written behind num_halo frames as in group_norm_silu; scale =
// weight_y z + bias_y and shift = weight_b z + bias_b are those of the latent pixel that nearest resizing finds.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/video.h"
#include "group_norm_silu/stage.h"

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

// On a GPU: scale and shift of every latent pixel, for the stages of group_norm_silu and those below.
struct LatentArgs {
  DType dtype;
  int64_t pixels, depth, channels;              // B T_z H_z W_z, C_z, C
  char* z;                                      // [pixels, C_z]
  char *weight_y, *bias_y, *weight_b, *bias_b;  // [C, C_z], [C], [C, C_z], [C]
  char* latent;                                 // [pixels, 2 C]
};

using group_norm_silu::Stage;

// Latent pixels of one row that one block adds gradients up for; a function of the sizes alone, as all sums are.
COGVX_HOST_DEVICE static inline int64_t columns_of_block(const Stage& stage) {
  const int64_t lines = stage.latent_frames * stage.latent_height;
  const int64_t at_once = stage.channels < 2048 ? 2048 / stage.channels : 1;
  const int64_t blocks = lines < 1024 ? (1023 + lines) / lines : 1;
  const int64_t columns = (stage.latent_width + blocks - 1) / blocks;
  return (columns + at_once - 1) / at_once * at_once;
}

COGVX_HOST_DEVICE static inline int64_t blocks_of_row(const Stage& stage) {
  return (stage.latent_width + columns_of_block(stage) - 1) / columns_of_block(stage);
}

// Each returns nullptr, or what went wrong.
const char* project_cuda(const LatentArgs& args, int device, uintptr_t stream);
const char* apply_cuda(const Stage& stage, int device, uintptr_t stream);     // y
const char* sums_cuda(const Stage& stage, int device, uintptr_t stream);      // grad_latent, partials
const char* gradient_cuda(const Stage& stage, int device, uintptr_t stream);  // grad_x

}  // namespace cogvx::spatial_norm_silu
