#include "causal_conv3d/causal_conv3d.h"
#include "common/convolution_bind.h"

namespace py = pybind11;

namespace cogvx {

void register_causal_conv3d(py::module_& m) {
  m.attr("CONVOLUTION_BLOCKS") = py::make_tuple(kConvolutionBlocks[0], kConvolutionBlocks[1]);
  m.attr("CONVOLUTION_DEPTH") = kConvolutionDepth;
  m.attr("CONVOLUTION_TAPS") = kConvolutionTaps;
  m.attr("CONVOLUTION_WEIGHT_PATCH") = py::make_tuple(kWeightPatch[0], kWeightPatch[1]);
  define_convolution<causal_conv3d::forward_cuda>(m, "causal_conv3d_forward");
  define_weight_gradient<causal_conv3d::weight_cuda>(m, "causal_conv3d_weight");
}

}  // namespace cogvx
