#include "upsample_conv/upsample_conv.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

namespace py = pybind11;

namespace cogvx::upsample_conv {
namespace {

using Sizes = std::array<int, 7>;  // B, channels of the input and of the result, T, H, W, block; H and W of x

Convolution convolution(const std::string& dtype, const Sizes& sizes, uintptr_t from, uintptr_t weight, uintptr_t to) {
  Convolution args{};
  args.dtype = parse_dtype(dtype);
  args.batch = sizes[0];
  args.channels = sizes[1];
  args.channels_out = sizes[2];
  args.frames_in = args.frames_out = sizes[3];
  args.height = sizes[4];
  args.width = sizes[5];
  args.taps_t = 1;
  args.taps_h = args.taps_w = 2;
  args.block = sizes[6];
  args.x = pointer(from);
  args.weight = pointer(weight);
  args.y = pointer(to);
  return args;
}

void forward(const PyPlace& where, const std::string& dtype, const Sizes& sizes, bool double_time, uintptr_t x,
             uintptr_t weight, uintptr_t bias, uintptr_t y) {
  Convolution args = convolution(dtype, sizes, x, weight, y);
  args.spread = true;
  args.repeated = double_time;
  args.bias = pointer(bias);
  [[maybe_unused]] const Place at = place(where);
  const py::gil_scoped_release release;
  COGVX_ON_CUDA("upsample_conv", convolve_cuda(args, at.device, at.stream));
}

void input(const PyPlace& where, const std::string& dtype, const Sizes& sizes, uintptr_t grad, uintptr_t weight,
           uintptr_t grad_x) {
  Convolution args = convolution(dtype, sizes, grad, weight, grad_x);
  args.gathered = true;
  [[maybe_unused]] const Place at = place(where);
  const py::gil_scoped_release release;
  COGVX_ON_CUDA("upsample_conv", convolve_cuda(args, at.device, at.stream));
}

using WeightSizes = std::array<int, 8>;  // B, C, C_out, T, H, W, patches a split, splits

void weight(const PyPlace& where, const std::string& dtype, const WeightSizes& sizes, uintptr_t x, uintptr_t grad,
            uintptr_t partials) {
  [[maybe_unused]] WeightGradient args{};
  args.dtype = parse_dtype(dtype);
  args.batch = sizes[0];
  args.channels_left = sizes[1];
  args.channels_right = sizes[2];
  args.frames = sizes[3];
  args.height = sizes[4];
  args.width = sizes[5];
  args.taps_t = 1;
  args.taps_h = args.taps_w = 4;
  args.pad_h = args.pad_w = 1;
  args.step = 2;
  args.patches_a_split = sizes[6];
  args.num_splits = sizes[7];
  args.left = pointer(x);
  args.right = pointer(grad);
  args.partials = reinterpret_cast<float*>(partials);
  [[maybe_unused]] const Place at = place(where);
  const py::gil_scoped_release release;
  COGVX_ON_CUDA("upsample_conv", weight_cuda(args, at.device, at.stream));
}

}  // namespace
}  // namespace cogvx::upsample_conv

namespace cogvx {

void register_upsample_conv(py::module_& m) {
  m.def("upsample_conv_forward", &upsample_conv::forward);
  m.def("upsample_conv_input", &upsample_conv::input);
  m.def("upsample_conv_weight", &upsample_conv::weight);
}

}  // namespace cogvx
