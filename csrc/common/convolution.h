// A convolution of video frames on a GPU, as `causal_conv3d` and `upsample_conv` need it; every tensor channels-last.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace cogvx {

// y[b, t, r, s] = bias + sum over k_t, k_h, k_w of x[b, t + k_t - pad_t, r + k_h - pad, s + k_w - pad] weight, zeros
// outside the frames, pads half the taps. Where y is `spread`, each frame of it has twice the rows and columns: pixel
// (2r + p, 2s + q) is that of phase (p, q), each phase with its own weight and pads 1 - p and 1 - q. Where x is
// `gathered`, it is x that has twice the rows and columns: phase (p, q) of it is (2r + p, 2s + q), with its own weight
// and pads p and q, and the phases are summed.
struct Convolution {
  DType dtype;  // float16 or bfloat16
  int batch, channels, channels_out;  // `channels` is a multiple of 8
  int frames_in, frames_out, pad_t;
  int height, width;           // of a phase
  int taps_t, taps_h, taps_w;  // of a phase
  int block;                   // output channels of a tile, one of kConvolutionBlocks
  bool spread, gathered;
  bool repeated;  // every frame of y comes twice, in an odd number of frames_out the first comes once
  const char* x;
  const char* weight;  // [phases of y, tiles, taps_t, phases of x, channels / 32, taps_h, taps_w, block, 32]
  const char* bias;    // [channels_out] or nullptr
  char* y;
};

// partials[split, m, tap, n] = sum over the split's pixels of left[b, t, r, s, m] right[b, t + k_t, r', s', n] with
// r' = step r + k_h - pad_h and s' = step s + k_w - pad_w, zeros outside the frames: the gradient of a weight.
struct WeightGradient {
  DType dtype;  // of left and right, float16 or bfloat16
  int batch, frames, height, width;  // of left; right has `step` times the rows and columns, taps_t - 1 frames more
  int channels_left, channels_right;  // multiples of 8
  int taps_t, taps_h, taps_w, pad_h, pad_w, step;
  int patches_a_split, num_splits;  // patches of kWeightPatch pixels of left, frame by frame
  const char *left, *right;
  float* partials;  // [num_splits, channels_left, taps, channels_right]
};

constexpr int kConvolutionBlocks[2] = {128, 32};
constexpr int kConvolutionDepth = 32;     // input channels of a tile
constexpr int kConvolutionTaps = 9;       // at most, along the height and the width
constexpr int kWeightPatch[2] = {2, 16};  // pixels whose products are summed at once

}  // namespace cogvx
