// `causal_conv3d`, and mean and variance of each channel of its result, for the norm that follows, on GPUs.
#pragma once

#include "common/convolution.h"
#include "common/place.h"

namespace cogvx::causal_conv3d_moments {

// How many tiles a convolution measures in a sample.
inline int64_t num_tiles(int64_t frames, int64_t height, int64_t width) {
  const int64_t rows = (height + kConvolutionTile[0] - 1) / kConvolutionTile[0];
  return frames * rows * ((width + kConvolutionTile[1] - 1) / kConvolutionTile[1]);
}

// Parts of a sample, each with the number of its pixels, their mean and their squared differences from it, and the
// groups of neighbours that they are put together to: `a_group` parts each, the last with the rest.
struct Merge {
  const float* from;  // [batch, parts, 3, channels]
  float* to;          // [batch, groups, 3, channels]; of a single group [batch, 2, channels], mean and variance
  int batch, channels;
  int64_t parts, a_group;
};

const char* forward_cuda(const Convolution& args, int device, uintptr_t stream);
const char* merge_cuda(const Merge& args, int device, uintptr_t stream);

}  // namespace cogvx::causal_conv3d_moments
