#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/place.h"
#include "group_norm_silu/bind_stage.h"
#include "group_norm_silu/group_norm_silu.h"

namespace py = pybind11;

namespace cogvx::group_norm_silu {
namespace {

using Sizes = std::array<int64_t, 4>;  // B, C, T, H * W

Args inputs(const std::pair<std::string, std::string>& dtypes, const Sizes& sizes, bool channels_last,
            int64_t num_groups, double eps, int64_t num_halo, int64_t num_copies, uintptr_t x, uintptr_t weight,
            uintptr_t bias) {
  Args args{};
  args.dtype = parse_dtype(dtypes.first);
  args.weight_dtype = parse_dtype(dtypes.second);
  args.num_groups = num_groups;
  args.num_halo = num_halo;
  args.num_copies = num_copies;
  args.eps = eps;
  args.x = {pointer(x), sizes[0], sizes[1], sizes[2], sizes[3], channels_last};
  args.weight = pointer(weight);
  args.bias = pointer(bias);
  return args;
}

Video behind_halo(const Args& args, uintptr_t address) {
  Video video = args.x;
  video.data = pointer(address);
  video.frames += args.num_halo;
  return video;
}

void forward(int threads, const std::pair<std::string, std::string>& dtypes, const Sizes& sizes, bool channels_last,
             int64_t num_groups, double eps, int64_t num_halo, int64_t num_copies, uintptr_t x, uintptr_t weight,
             uintptr_t bias, uintptr_t y) {
  Args args = inputs(dtypes, sizes, channels_last, num_groups, eps, num_halo, num_copies, x, weight, bias);
  args.y = behind_halo(args, y);
  const py::gil_scoped_release release;
  COGVX_ON_THIS_CPU(forward(args, threads));
}

void backward(int threads, const std::pair<std::string, std::string>& dtypes, const Sizes& sizes, bool channels_last,
              int64_t num_groups, double eps, int64_t num_halo, int64_t num_copies, uintptr_t x, uintptr_t weight,
              uintptr_t bias, uintptr_t grad, uintptr_t grad_x, bool in_double, uintptr_t grad_weight,
              uintptr_t grad_bias) {
  Args args = inputs(dtypes, sizes, channels_last, num_groups, eps, num_halo, num_copies, x, weight, bias);
  args.grad = behind_halo(args, grad);
  args.grad_x = args.x;
  args.grad_x.data = pointer(grad_x);
  args.in_double = in_double;
  args.grad_weight = pointer(grad_weight);
  args.grad_bias = pointer(grad_bias);
  const py::gil_scoped_release release;
  COGVX_ON_THIS_CPU(backward(args, threads));
}

}  // namespace
}  // namespace cogvx::group_norm_silu

namespace cogvx {

void register_group_norm_silu(py::module_& m) {
  m.def("group_norm_silu_forward", &group_norm_silu::forward);
  m.def("group_norm_silu_backward", &group_norm_silu::backward);
  m.def("group_norm_pieces", &group_norm_silu::pieces);
  m.def("group_norm_statistics", COGVX_STAGE("group_norm_silu", group_norm_silu::statistics_cuda));
  m.def("group_norm_silu_apply", COGVX_STAGE("group_norm_silu", group_norm_silu::apply_cuda));
  m.def("group_norm_silu_sums", COGVX_STAGE("group_norm_silu", group_norm_silu::sums_cuda));
  m.def("group_norm_silu_gradient", COGVX_STAGE("group_norm_silu", group_norm_silu::gradient_cuda));
}

}  // namespace cogvx
