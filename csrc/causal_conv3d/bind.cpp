#include "causal_conv3d/causal_conv3d.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

namespace py = pybind11;

namespace cogvx::causal_conv3d {
namespace {

using Sizes = std::array<int, 12>;  // B, C, C_out, frames of x and of y, pad_t, H, W, K_t, K_h, K_w, block

void forward(const PyPlace& where, const std::string& dtype, const Sizes& sizes, uintptr_t x, uintptr_t weight,
             uintptr_t bias, uintptr_t y) {
  [[maybe_unused]] Convolution args{};
  args.dtype = parse_dtype(dtype);
  args.batch = sizes[0];
  args.channels = sizes[1];
  args.channels_out = sizes[2];
  args.frames_in = sizes[3];
  args.frames_out = sizes[4];
  args.pad_t = sizes[5];
  args.height = sizes[6];
  args.width = sizes[7];
  args.taps_t = sizes[8];
  args.taps_h = sizes[9];
  args.taps_w = sizes[10];
  args.block = sizes[11];
  args.x = pointer(x);
  args.weight = pointer(weight);
  args.bias = pointer(bias);
  args.y = pointer(y);
  [[maybe_unused]] const Place at = place(where);
  const py::gil_scoped_release release;
  COGVX_ON_CUDA("causal_conv3d", forward_cuda(args, at.device, at.stream));
}

using WeightSizes = std::array<int, 11>;  // B, C_out, C, T, H, W, K_t, K_h, K_w, patches a split, splits

void weight(const PyPlace& where, const std::string& dtype, const WeightSizes& sizes, uintptr_t grad, uintptr_t x,
            uintptr_t partials) {
  [[maybe_unused]] WeightGradient args{};
  args.dtype = parse_dtype(dtype);
  args.batch = sizes[0];
  args.channels_left = sizes[1];
  args.channels_right = sizes[2];
  args.frames = sizes[3];
  args.height = sizes[4];
  args.width = sizes[5];
  args.taps_t = sizes[6];
  args.taps_h = sizes[7];
  args.taps_w = sizes[8];
  args.pad_h = sizes[7] / 2;
  args.pad_w = sizes[8] / 2;
  args.step = 1;
  args.patches_a_split = sizes[9];
  args.num_splits = sizes[10];
  args.left = pointer(grad);
  args.right = pointer(x);
  args.partials = reinterpret_cast<float*>(partials);
  [[maybe_unused]] const Place at = place(where);
  const py::gil_scoped_release release;
  COGVX_ON_CUDA("causal_conv3d", weight_cuda(args, at.device, at.stream));
}

}  // namespace
}  // namespace cogvx::causal_conv3d

namespace cogvx {

void register_causal_conv3d(py::module_& m) {
  m.attr("CONVOLUTION_BLOCKS") = py::make_tuple(kConvolutionBlocks[0], kConvolutionBlocks[1]);
  m.attr("CONVOLUTION_DEPTH") = kConvolutionDepth;
  m.attr("CONVOLUTION_TAPS") = kConvolutionTaps;
  m.attr("CONVOLUTION_WEIGHT_PATCH") = py::make_tuple(kWeightPatch[0], kWeightPatch[1]);
  m.def("causal_conv3d_forward", &causal_conv3d::forward);
  m.def("causal_conv3d_weight", &causal_conv3d::weight);
}

}  // namespace cogvx
