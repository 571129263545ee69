#include "common/convolution.cuh"
#include "common/convolution_weight.cuh"
#include "downsample_conv/downsample_conv.h"

namespace cogvx::downsample_conv {

const char* forward_cuda(const Convolution& args, int device, uintptr_t stream) {
  return convolve<Sampling::gathered>(args, device, stream);
}

const char* input_cuda(const Convolution& args, int device, uintptr_t stream) {
  return convolve<Sampling::spread>(args, device, stream);
}

const char* weight_cuda(const WeightGradient& args, int device, uintptr_t stream) {
  return weight_gradient(args, device, stream);
}

}  // namespace cogvx::downsample_conv
