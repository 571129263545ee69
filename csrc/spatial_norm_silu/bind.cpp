#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>

#include "common/place.h"
#include "group_norm_silu/bind_stage.h"
#include "spatial_norm_silu/spatial_norm_silu.h"

namespace py = pybind11;

namespace cogvx::spatial_norm_silu {
namespace {

using Sizes = std::array<int64_t, 5>;  // B, C, T, H, W; of x and of z
using DTypes = std::pair<std::string, std::string>;
using Numbers = std::tuple<int64_t, double, int64_t, int64_t>;  // num_groups, eps, num_halo, num_copies
using Firsts = std::array<std::vector<int64_t>, 3>;

// The first of `size` pixels whose nearest is each of `count`; nearest is found in float, as PyTorch does.
std::vector<int64_t> first_of(int64_t count, int64_t size) {
  const float scale = static_cast<float>(count) / static_cast<float>(size);
  const auto nearest = [=](int64_t i) {
    return std::min(static_cast<int64_t>(std::floor(static_cast<float>(i) * scale)), count - 1);
  };
  std::vector<int64_t> first(count + 1);
  for (int64_t i = 0, j = 0; j <= count; ++j) {
    while (i < size && nearest(i) < j) ++i;
    first[j] = i;
  }
  return first;
}

Firsts firsts(const Sizes& x, const Sizes& z) {
  Firsts result{first_of(z[2], x[2]), first_of(z[3], x[3]), first_of(z[4], x[4])};
  if (x[2] > 1 && x[2] % 2 == 1) {  // the first frame alone
    result[0] = first_of(z[2] - 1, x[2] - 1);
    for (int64_t& first : result[0]) ++first;
    result[0].insert(result[0].begin(), 0);
  }
  return result;
}

Video video(uintptr_t data, const Sizes& sizes, bool channels_last) {
  return {pointer(data), sizes[0], sizes[1], sizes[2], sizes[3] * sizes[4], channels_last};
}

Args inputs(const DTypes& dtypes, const Sizes& x_sizes, const Sizes& z_sizes, bool channels_last,
            const Numbers& numbers, const std::array<uintptr_t, 8>& tensors, const Firsts& first) {
  Args args{};
  args.dtype = parse_dtype(dtypes.first);
  args.weight_dtype = parse_dtype(dtypes.second);
  std::tie(args.num_groups, args.eps, args.num_halo, args.num_copies) = numbers;
  args.x = video(tensors[0], x_sizes, channels_last);
  args.width = x_sizes[4];
  args.z = video(tensors[1], z_sizes, channels_last);
  args.latent_height = z_sizes[3];
  args.latent_width = z_sizes[4];
  args.first_frame = first[0].data();
  args.first_row = first[1].data();
  args.first_column = first[2].data();
  char** targets[] = {&args.weight, &args.bias, &args.weight_y, &args.bias_y, &args.weight_b, &args.bias_b};
  for (int i = 0; i < 6; ++i) *targets[i] = pointer(tensors[i + 2]);
  return args;
}

Video behind_halo(const Args& args, uintptr_t address) {
  Video video = args.x;
  video.data = pointer(address);
  video.frames += args.num_halo;
  return video;
}

void forward(int threads, const DTypes& dtypes, const Sizes& x_sizes, const Sizes& z_sizes, bool channels_last,
             const Numbers& numbers, const std::array<uintptr_t, 8>& tensors, uintptr_t y) {
  const Firsts first = firsts(x_sizes, z_sizes);
  Args args = inputs(dtypes, x_sizes, z_sizes, channels_last, numbers, tensors, first);
  args.y = behind_halo(args, y);
  const py::gil_scoped_release release;
  COGVX_ON_THIS_CPU(forward(args, threads));
}

void backward(int threads, const DTypes& dtypes, const Sizes& x_sizes, const Sizes& z_sizes, bool channels_last,
              const Numbers& numbers, const std::array<uintptr_t, 8>& tensors, uintptr_t grad, uintptr_t grad_x,
              bool in_double, uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t grad_scale, uintptr_t grad_shift) {
  const Firsts first = firsts(x_sizes, z_sizes);
  Args args = inputs(dtypes, x_sizes, z_sizes, channels_last, numbers, tensors, first);
  const Sizes of_latent{z_sizes[0], x_sizes[1], z_sizes[2], z_sizes[3], z_sizes[4]};
  args.grad = behind_halo(args, grad);
  args.grad_x = video(grad_x, x_sizes, channels_last);
  args.in_double = in_double;
  args.grad_weight = pointer(grad_weight);
  args.grad_bias = pointer(grad_bias);
  args.grad_scale = video(grad_scale, of_latent, channels_last);
  args.grad_shift = video(grad_shift, of_latent, channels_last);
  const py::gil_scoped_release release;
  COGVX_ON_THIS_CPU(backward(args, threads));
}

// Sizes are B T_z H_z W_z, C_z and C; tensors z, weight_y, bias_y, weight_b, bias_b and the result.
void project(const PyPlace& where, const std::string& dtype, const std::array<int64_t, 3>& sizes,
             const std::array<uintptr_t, 6>& tensors) {
  LatentArgs args{};
  args.dtype = parse_dtype(dtype);
  args.pixels = sizes[0];
  args.depth = sizes[1];
  args.channels = sizes[2];
  char** targets[] = {&args.z, &args.weight_y, &args.bias_y, &args.weight_b, &args.bias_b, &args.latent};
  for (int i = 0; i < 6; ++i) *targets[i] = pointer(tensors[i]);
  const Place at = place(where);
  const py::gil_scoped_release release;
  COGVX_ON_CUDA("spatial_norm_silu", project_cuda(args, at.device, at.stream));
}

// How many blocks of a sample have sums of their own.
int64_t blocks(const group_norm_silu::StageSizes& sizes) {
  const Stage stage = group_norm_silu::stage_of("float32", 1, sizes, {});
  return stage.latent_frames * stage.latent_height * blocks_of_row(stage);
}

}  // namespace
}  // namespace cogvx::spatial_norm_silu

namespace cogvx {

void register_spatial_norm_silu(py::module_& m) {
  m.def("spatial_norm_silu_forward", &spatial_norm_silu::forward);
  m.def("spatial_norm_silu_backward", &spatial_norm_silu::backward);
  m.def("spatial_norm_silu_project", &spatial_norm_silu::project);
  m.def("spatial_norm_silu_blocks", &spatial_norm_silu::blocks);
  m.def("spatial_norm_silu_apply", COGVX_STAGE("spatial_norm_silu", spatial_norm_silu::apply_cuda));
  m.def("spatial_norm_silu_sums", COGVX_STAGE("spatial_norm_silu", spatial_norm_silu::sums_cuda));
  m.def("spatial_norm_silu_gradient", COGVX_STAGE("spatial_norm_silu", spatial_norm_silu::gradient_cuda));
}

}  // namespace cogvx
