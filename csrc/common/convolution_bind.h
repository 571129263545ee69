// Convolutions as Python calls them: an operator binds those that it is made of.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "common/convolution.h"
#include "common/place.h"

namespace cogvx {

// B, channels of x and of y, frames of x and of y, pad_t, H and W of x, H and W of y, K_t, K_h, K_w, pad_h, pad_w,
// block.
using ConvolutionSizes = std::array<int, 16>;
using ConvolutionTensors = std::array<uintptr_t, 6>;  // x, weight, bias or 0, residual or 0, y, moments or 0

inline Convolution convolution(const std::string& dtype, const ConvolutionSizes& sizes, bool repeated,
                               const ConvolutionTensors& tensors) {
  Convolution args{};
  args.dtype = parse_dtype(dtype);
  int* const fields[] = {&args.batch,  &args.channels,  &args.channels_out, &args.frames_in, &args.frames_out,
                         &args.pad_t,  &args.height_in, &args.width_in,     &args.height,    &args.width,
                         &args.taps_t, &args.taps_h,    &args.taps_w,       &args.pad_h,     &args.pad_w,
                         &args.block};
  for (size_t i = 0; i < sizes.size(); ++i) *fields[i] = sizes[i];
  args.repeated = repeated;
  args.x = pointer(tensors[0]);
  args.weight = pointer(tensors[1]);
  args.bias = pointer(tensors[2]);
  args.residual = pointer(tensors[3]);
  args.y = pointer(tensors[4]);
  args.moments = reinterpret_cast<float*>(tensors[5]);
  return args;
}

// B, channels of left and of right, frames, H and W of left, H and W of right, K_t, K_h, K_w, pad_h, pad_w, step,
// patches a split, splits.
using WeightGradientSizes = std::array<int, 16>;
using WeightGradientTensors = std::array<uintptr_t, 3>;  // left, right, partials

inline WeightGradient weight_gradient(const std::string& dtype, const WeightGradientSizes& sizes,
                                      const WeightGradientTensors& tensors) {
  WeightGradient args{};
  args.dtype = parse_dtype(dtype);
  int* const fields[] = {&args.batch,  &args.channels_left, &args.channels_right,  &args.frames,
                         &args.height, &args.width,         &args.height_right,    &args.width_right,
                         &args.taps_t, &args.taps_h,        &args.taps_w,          &args.pad_h,
                         &args.pad_w,  &args.step,          &args.patches_a_split, &args.num_splits};
  for (size_t i = 0; i < sizes.size(); ++i) *fields[i] = sizes[i];
  args.left = pointer(tensors[0]);
  args.right = pointer(tensors[1]);
  args.partials = reinterpret_cast<float*>(tensors[2]);
  return args;
}

template <const char* (*kLaunch)(const Convolution&, int, uintptr_t)>
void define_convolution(pybind11::module_& m, const char* name) {
  m.def(name, [name](const PyPlace& where, const std::string& dtype, const ConvolutionSizes& sizes, bool repeated,
                     const ConvolutionTensors& tensors) {
    [[maybe_unused]] const Convolution args = convolution(dtype, sizes, repeated, tensors);
    [[maybe_unused]] const Place at = place(where);
    const pybind11::gil_scoped_release release;
    COGVX_ON_CUDA(name, kLaunch(args, at.device, at.stream));
  });
}

template <const char* (*kLaunch)(const WeightGradient&, int, uintptr_t)>
void define_weight_gradient(pybind11::module_& m, const char* name) {
  m.def(name, [name](const PyPlace& where, const std::string& dtype, const WeightGradientSizes& sizes,
                     const WeightGradientTensors& tensors) {
    [[maybe_unused]] const WeightGradient args = weight_gradient(dtype, sizes, tensors);
    [[maybe_unused]] const Place at = place(where);
    const pybind11::gil_scoped_release release;
    COGVX_ON_CUDA(name, kLaunch(args, at.device, at.stream));
  });
}

}  // namespace cogvx
