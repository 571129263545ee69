#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "expert_layernorm/expert_layernorm.h"

namespace py = pybind11;

namespace cogvx::expert_layernorm {
namespace {

using Sizes = std::array<int64_t, 4>;  // B, N, D, num_text

Args inputs(const std::string& dtype, const Sizes& sizes, double eps, const PyRows& x, uintptr_t weight, uintptr_t bias,
            const PyRows& shift, const PyRows& scale) {
  Args args{};
  args.dtype = parse_dtype(dtype);
  args.batch = sizes[0];
  args.num_rows = sizes[1];
  args.width = sizes[2];
  args.num_text = sizes[3];
  args.eps = eps;
  args.x = rows(x);
  args.weight = pointer(weight);
  args.bias = pointer(bias);
  args.shift = rows(shift);
  args.scale = rows(scale);
  return args;
}

void forward(const PyPlace& where, const std::string& dtype, const Sizes& sizes, double eps, const PyRows& x,
             uintptr_t weight, uintptr_t bias, const PyRows& shift, const PyRows& scale, const PyRows& y) {
  Args args = inputs(dtype, sizes, eps, x, weight, bias, shift, scale);
  args.y = rows(y);
  const Place at = place(where);
  const py::gil_scoped_release release;
  if (at.is_cuda)
    COGVX_ON_CUDA("expert_layernorm", forward_cuda(args, at.device, at.stream));
  else
    COGVX_ON_THIS_CPU(forward(args, at.threads));
}

void backward(const PyPlace& where, const std::string& dtype, const Sizes& sizes, double eps, const PyRows& x,
              uintptr_t weight, uintptr_t bias, const PyRows& shift, const PyRows& scale, const PyRows& grad,
              const PyRows& grad_x, uintptr_t grad_weight, uintptr_t grad_bias, const PyRows& grad_shift,
              const PyRows& grad_scale, uintptr_t partials) {
  Args args = inputs(dtype, sizes, eps, x, weight, bias, shift, scale);
  args.grad = rows(grad);
  args.grad_x = rows(grad_x);
  args.grad_weight = pointer(grad_weight);
  args.grad_bias = pointer(grad_bias);
  args.grad_shift = rows(grad_shift);
  args.grad_scale = rows(grad_scale);
  args.partials = pointer(partials);
  const Place at = place(where);
  const py::gil_scoped_release release;
  if (at.is_cuda)
    COGVX_ON_CUDA("expert_layernorm", backward_cuda(args, at.device, at.stream));
  else
    COGVX_ON_THIS_CPU(backward(args, at.threads));
}

}  // namespace
}  // namespace cogvx::expert_layernorm

namespace cogvx {

void register_expert_layernorm(py::module_& m) {
  m.attr("EXPERT_LAYERNORM_CHUNK") = expert_layernorm::kChunk;
  m.attr("EXPERT_LAYERNORM_NARROW") = expert_layernorm::kNarrow;
  m.def("expert_layernorm_forward", &expert_layernorm::forward);
  m.def("expert_layernorm_backward", &expert_layernorm::backward);
}

}  // namespace cogvx
