#include "causal_conv3d/causal_conv3d.h"
#include "common/convolution.cuh"
#include "common/convolution_weight.cuh"

namespace cogvx::causal_conv3d {

const char* forward_cuda(const Convolution& args, int device, uintptr_t stream) {
  return convolve<Sampling::none>(args, device, stream);
}

const char* weight_cuda(const WeightGradient& args, int device, uintptr_t stream) {
  return weight_gradient(args, device, stream);
}

}  // namespace cogvx::causal_conv3d
