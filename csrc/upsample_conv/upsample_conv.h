// Nearest upsampling and a 3x3 convolution as four phases of 2x2 merged taps, and the gradients, on GPUs.
#pragma once

#include "common/convolution.h"
#include "common/place.h"

namespace cogvx::upsample_conv {

const char* convolve_cuda(const Convolution& args, int device, uintptr_t stream);  // forward, or the gradient of x
const char* weight_cuda(const WeightGradient& args, int device, uintptr_t stream);

}  // namespace cogvx::upsample_conv
