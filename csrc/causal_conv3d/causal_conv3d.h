// y[t] = sum over k of conv2d(x[t + k], weight[:, :, k]) + bias, and the gradients of its arguments, on GPUs.
#pragma once

#include "common/convolution.h"
#include "common/place.h"

namespace cogvx::causal_conv3d {

const char* forward_cuda(const Convolution& args, int device, uintptr_t stream);  // also the gradient of x
const char* weight_cuda(const WeightGradient& args, int device, uintptr_t stream);

}  // namespace cogvx::causal_conv3d
