#include "common/convolution_bind.h"
#include "downsample_conv/downsample_conv.h"

namespace cogvx {

void register_downsample_conv(pybind11::module_& m) {
  define_convolution<downsample_conv::forward_cuda>(m, "downsample_conv_forward");
  define_convolution<downsample_conv::input_cuda>(m, "downsample_conv_input");
  define_weight_gradient<downsample_conv::weight_cuda>(m, "downsample_conv_weight");
}

}  // namespace cogvx
