#include "common/convolution_bind.h"
#include "upsample_conv/upsample_conv.h"

namespace cogvx {

void register_upsample_conv(pybind11::module_& m) {
  define_convolution<upsample_conv::forward_cuda>(m, "upsample_conv_forward");
  define_convolution<upsample_conv::input_cuda>(m, "upsample_conv_input");
  define_weight_gradient<upsample_conv::weight_cuda>(m, "upsample_conv_weight");
}

}  // namespace cogvx
