// A 3x3 convolution with step 2 and its gradients, on GPUs.
#pragma once

#include "common/convolution.h"
#include "common/place.h"

namespace cogvx::downsample_conv {

const char* forward_cuda(const Convolution& args, int device, uintptr_t stream);
const char* input_cuda(const Convolution& args, int device, uintptr_t stream);  // the gradient of x
const char* weight_cuda(const WeightGradient& args, int device, uintptr_t stream);

}  // namespace cogvx::downsample_conv
