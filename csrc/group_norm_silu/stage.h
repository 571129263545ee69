// What GroupNorm and SiLU are on a GPU, for this norm and for the spatial one: stages, each a kernel or two.
//
// Every video lies in memory as [B, T, H, W, C]. Without a latent, a frame is one row of H W pixels.
#pragma once

#include <cstdint>

#include "common/dtype.h"

#ifdef __CUDACC__
#define COGVX_HOST_DEVICE __host__ __device__
#else
#define COGVX_HOST_DEVICE
#endif

namespace cogvx::group_norm_silu {

struct Stage {
  DType dtype;  // of x, y, the latent and their gradients
  double eps;
  int64_t batch, channels, frames, height, width;
  int64_t num_halo, num_copies, num_groups;  // num_copies is 0 or num_halo
  int64_t latent_frames, latent_height, latent_width;
  int64_t in_double;     // 1: float32 is summed and differentiated in double; else 0
  char *x, *y;           // T and num_halo + T frames
  float *weight, *bias;  // [C]
  double* moments;       // [B, pieces, 2, C]: mean and summed squared differences from it
  double* statistics;    // [B, 2, C]: mean and 1 / sqrt(variance + eps) of each channel's group
  char* latent;          // [B, T_z, H_z, W_z, 2 C]: scale and shift
  char *grad, *grad_x;   // backward alone: of y, of x
  double* partials;      // [B, pieces, 2, C]: sums of d and d * (x - mean), with d = dL/dv times scale
  double* ends;          // [B, 2, C]: constant and slope of dL/dx = d * rstd * weight + constant + (x - mean) * slope
  char* grad_latent;     // [B, T_z, H_z, W_z, 2 C] in float, or in_double
  float* channel_moments;  // [B, 2, C] or nullptr: mean and variance of each channel of x, in the place of moments
};

// Consecutive pixels of one row. Their number depends on the sizes alone, and so do all sums.
struct Piece {
  int64_t frame, row;
  int first, last;
};

// What one block takes: coarse pieces where sums are made of them, fine ones where pixels are on their own.
enum class Grain { coarse, fine };

COGVX_HOST_DEVICE static inline int64_t pixels_of_piece(const Stage& stage, Grain grain) {
  const int64_t values = stage.frames * stage.height * stage.width * stage.channels;
  const int64_t least = grain == Grain::coarse ? 1 << 14 : 1 << 13, most = grain == Grain::coarse ? 1 << 18 : 1 << 16;
  const int64_t share = values / (grain == Grain::coarse ? 1024 : 4096);
  const int64_t pixels = (share < least ? least : share > most ? most : share) / stage.channels;
  const int64_t pieces = pixels < 1 ? stage.width : (stage.width + pixels - 1) / pixels;
  return (stage.width + pieces - 1) / pieces;  // about equal
}

COGVX_HOST_DEVICE static inline int64_t pieces_of_row(const Stage& stage, Grain grain) {
  const int64_t pixels = pixels_of_piece(stage, grain);
  return (stage.width + pixels - 1) / pixels;
}

COGVX_HOST_DEVICE static inline int64_t num_pieces(const Stage& stage, Grain grain) {  // of a sample
  return stage.frames * stage.height * pieces_of_row(stage, grain);
}

COGVX_HOST_DEVICE static inline Piece piece_at(const Stage& stage, int64_t index, Grain grain) {
  const int64_t of_row = pieces_of_row(stage, grain), row = index / of_row;
  const int64_t first = index % of_row * pixels_of_piece(stage, grain), last = first + pixels_of_piece(stage, grain);
  return {row / stage.height, row % stage.height, static_cast<int>(first),
          static_cast<int>(last < stage.width ? last : stage.width)};
}

// Each returns nullptr, or what went wrong.
const char* statistics_cuda(const Stage& stage, int device, uintptr_t stream);  // moments, statistics
const char* apply_cuda(const Stage& stage, int device, uintptr_t stream);       // y
const char* sums_cuda(const Stage& stage, int device, uintptr_t stream);        // partials
const char* gradient_cuda(const Stage& stage, int device, uintptr_t stream);    // grad_x

}  // namespace cogvx::group_norm_silu
