// How Python hands a stage of a norm over; for bind.cpp files.
#pragma once

#include <array>
#include <string>

#include "common/place.h"
#include "group_norm_silu/stage.h"

namespace cogvx::group_norm_silu {

using StageSizes = std::array<int64_t, 12>;     // from batch to in_double, in the order of Stage
using StageTensors = std::array<uintptr_t, 13>;  // from x to channel_moments

inline Stage stage_of(const std::string& dtype, double eps, const StageSizes& sizes, const StageTensors& tensors) {
  Stage stage{};
  stage.dtype = parse_dtype(dtype);
  stage.eps = eps;
  int64_t* numbers[] = {&stage.batch, &stage.channels, &stage.frames, &stage.height, &stage.width, &stage.num_halo,
                        &stage.num_copies, &stage.num_groups, &stage.latent_frames, &stage.latent_height,
                        &stage.latent_width, &stage.in_double};
  for (size_t i = 0; i < sizes.size(); ++i) *numbers[i] = sizes[i];
  const auto as_floats = [](uintptr_t address) { return reinterpret_cast<float*>(address); };
  const auto as_doubles = [](uintptr_t address) { return reinterpret_cast<double*>(address); };
  stage.x = pointer(tensors[0]);
  stage.y = pointer(tensors[1]);
  stage.weight = as_floats(tensors[2]);
  stage.bias = as_floats(tensors[3]);
  stage.moments = as_doubles(tensors[4]);
  stage.statistics = as_doubles(tensors[5]);
  stage.latent = pointer(tensors[6]);
  stage.grad = pointer(tensors[7]);
  stage.grad_x = pointer(tensors[8]);
  stage.partials = as_doubles(tensors[9]);
  stage.ends = as_doubles(tensors[10]);
  stage.grad_latent = pointer(tensors[11]);
  stage.channel_moments = as_floats(tensors[12]);
  return stage;
}

// How many pieces of a sample have sums of their own.
inline int64_t pieces(const StageSizes& sizes) { return num_pieces(stage_of("float32", 1, sizes, {}), Grain::coarse); }

// A function for Python that runs one of the stages.
#define COGVX_STAGE(operator_name, run)                                                                          \
  [](const cogvx::PyPlace& where, const std::string& dtype, double eps,                                          \
     const cogvx::group_norm_silu::StageSizes& sizes, const cogvx::group_norm_silu::StageTensors& tensors) {     \
    const cogvx::Place at = cogvx::place(where);                                                                 \
    const cogvx::group_norm_silu::Stage stage = cogvx::group_norm_silu::stage_of(dtype, eps, sizes, tensors);    \
    const pybind11::gil_scoped_release release;                                                                  \
    COGVX_ON_CUDA(operator_name, run(stage, at.device, at.stream));                                              \
  }

}  // namespace cogvx::group_norm_silu
