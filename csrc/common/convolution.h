// Convolutions of video frames on a GPU, as `causal_conv3d`, `upsample_conv` and `downsample_conv` need them; every
// tensor has its channels last.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace cogvx {

// Which of x and y has pixels twice as dense. A tap of weights then meets one phase (p, q) of that tensor alone, the
// pixels (2i + p, 2j + q): those whose number has the parity of phase + pad.
struct Plain {  // neither
  static constexpr bool kSpread = false, kGathered = false, kMeasured = false;
};
struct Measured {  // neither, and each tile says what mean and variance its channels have
  static constexpr bool kSpread = false, kGathered = false, kMeasured = true;
};
struct Spread {  // y
  static constexpr bool kSpread = true, kGathered = false, kMeasured = false;
};
struct Gathered {  // x
  static constexpr bool kSpread = false, kGathered = true, kMeasured = false;
};

// y[b, t, r, s] = bias + residual + sum over k_t, k_h, k_w of x[b, t + k_t - pad_t, r', s'] weight, zeros outside the
// frames. Along each axis r' = r + k - pad; where x is Gathered, r' = 2r + k - pad; where y is Spread, which is the
// gradient of that, r' = (r + pad - k) / 2 for those k for which it is whole.
struct Convolution {
  DType dtype;  // float16 or bfloat16
  int batch, channels, channels_out;  // `channels` is a multiple of 8
  int frames_in, frames_out, pad_t;
  int height_in, width_in, height, width;  // of x, of y
  int taps_t, taps_h, taps_w, pad_h, pad_w;
  int block;      // output channels of a tile, one of kConvolutionBlocks
  bool repeated;  // every frame of y comes twice, in an odd number of frames_out the first comes once
  const char* x;
  // [phases of y, tiles, taps_t, channels / 32, phases of x, taps of the phases along h and w, block, 32]; the taps in
  // the order of the pixels that they read.
  const char* weight;
  const char* bias;      // [channels_out] or nullptr
  const char* residual;  // as y, its channels filled up to a multiple of 8, or nullptr; not where y is Spread
  char* y;
  // [batch, tiles, 3, channels_out], where Measured: pixels of a tile, mean of y, sum of squared differences from it
  float* moments;
};

// partials[split, m, tap, n] = sum over the split's pixels of left[b, t, r, s, m] right[b, t + k_t, r', s', n] with
// r' = step r + k_h - pad_h and s' = step s + k_w - pad_w, zeros outside the frames: the gradient of a weight.
struct WeightGradient {
  DType dtype;  // of left and right, float16 or bfloat16
  int batch, frames, height, width;  // of left; right has taps_t - 1 frames more
  int height_right, width_right;
  int channels_left, channels_right;  // multiples of 8
  int taps_t, taps_h, taps_w, pad_h, pad_w, step;
  int patches_a_split, num_splits;  // patches of kWeightPatch pixels of left, frame by frame
  const char *left, *right;
  float* partials;  // [num_splits, channels_left, taps, channels_right]
};

constexpr int kConvolutionBlocks[2] = {128, 32};
constexpr int kConvolutionTile[2] = {8, 16};  // rows and columns of pixels
constexpr int kConvolutionDepth = 32;     // input channels of a tile
constexpr int kConvolutionTaps = 9;       // at most, along the height and the width
constexpr int kWeightPatch[2] = {2, 16};  // pixels whose products are summed at once

}  // namespace cogvx
