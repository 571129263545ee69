// The convolution itself, and by it the gradient of its input.
#include "causal_conv3d/causal_conv3d.h"
#include "common/convolution.cuh"

namespace cogvx::causal_conv3d {

const char* forward_cuda(const Convolution& args, int device, uintptr_t stream) {
  return convolve(args, device, stream);
}

}  // namespace cogvx::causal_conv3d
