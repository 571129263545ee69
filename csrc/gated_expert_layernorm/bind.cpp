#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "gated_expert_layernorm/gated_expert_layernorm.h"

namespace py = pybind11;

namespace cogvx::gated_expert_layernorm {
namespace {

using Sizes = std::array<int64_t, 4>;  // B, N, D, num_text

Args inputs(const std::string& dtype, const Sizes& sizes, double eps, const PyRows& x, const PyRows& y,
            const PyRows& gate, uintptr_t weight, uintptr_t bias, const PyRows& shift, const PyRows& scale) {
  Args args{};
  args.norm.dtype = parse_dtype(dtype);
  args.norm.batch = sizes[0];
  args.norm.num_rows = sizes[1];
  args.norm.width = sizes[2];
  args.norm.num_text = sizes[3];
  args.norm.eps = eps;
  args.norm.weight = pointer(weight);
  args.norm.bias = pointer(bias);
  args.norm.shift = rows(shift);
  args.norm.scale = rows(scale);
  args.x = rows(x);
  args.y = rows(y);
  args.gate = rows(gate);
  return args;
}

void forward(const PyPlace& where, const std::string& dtype, const Sizes& sizes, double eps, const PyRows& x,
             const PyRows& y, const PyRows& gate, uintptr_t weight, uintptr_t bias, const PyRows& shift,
             const PyRows& scale, const PyRows& x_new, const PyRows& normed) {
  Args args = inputs(dtype, sizes, eps, x, y, gate, weight, bias, shift, scale);
  args.x_new = rows(x_new);
  args.norm.y = rows(normed);
  const Place at = place(where);
  const py::gil_scoped_release release;
  if (at.is_cuda)
    COGVX_ON_CUDA("gated_expert_layernorm", forward_cuda(args, at.device, at.stream));
  else
    COGVX_ON_THIS_CPU(forward(args, at.threads));
}

void backward(const PyPlace& where, const std::string& dtype, const Sizes& sizes, double eps, const PyRows& x,
              const PyRows& y, const PyRows& gate, uintptr_t weight, uintptr_t bias, const PyRows& shift,
              const PyRows& scale, const PyRows& grad_x_new, const PyRows& grad_normed, const PyRows& grad_x,
              const PyRows& grad_y, const PyRows& grad_gate, uintptr_t grad_weight, uintptr_t grad_bias,
              const PyRows& grad_shift, const PyRows& grad_scale, uintptr_t partials, uintptr_t gate_partials) {
  Args args = inputs(dtype, sizes, eps, x, y, gate, weight, bias, shift, scale);
  args.grad_x_new = rows(grad_x_new);
  args.norm.grad = rows(grad_normed);
  args.norm.grad_x = rows(grad_x);
  args.grad_y = rows(grad_y);
  args.grad_gate = rows(grad_gate);
  args.norm.grad_weight = pointer(grad_weight);
  args.norm.grad_bias = pointer(grad_bias);
  args.norm.grad_shift = rows(grad_shift);
  args.norm.grad_scale = rows(grad_scale);
  args.norm.partials = pointer(partials);
  args.gate_partials = pointer(gate_partials);
  const Place at = place(where);
  const py::gil_scoped_release release;
  if (at.is_cuda)
    COGVX_ON_CUDA("gated_expert_layernorm", backward_cuda(args, at.device, at.stream));
  else
    COGVX_ON_THIS_CPU(backward(args, at.threads));
}

}  // namespace
}  // namespace cogvx::gated_expert_layernorm

namespace cogvx {

void register_gated_expert_layernorm(py::module_& m) {
  m.def("gated_expert_layernorm_forward", &gated_expert_layernorm::forward);
  m.def("gated_expert_layernorm_backward", &gated_expert_layernorm::backward);
}

}  // namespace cogvx
