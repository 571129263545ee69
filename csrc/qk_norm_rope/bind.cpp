#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "qk_norm_rope/qk_norm_rope.h"

namespace py = pybind11;

namespace cogvx::qk_norm_rope {
namespace {

using Sizes = std::array<int64_t, 5>;                             // B, N, num_text, A, E
using Norms = std::array<uintptr_t, 4>;                           // weight and bias of q, weight and bias of k
using Turns = std::array<uintptr_t, 2>;                           // cos, sin
using PyHeads = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, strides
using Three = std::array<PyHeads, 3>;                             // q, k, v

void fill(const Three& from, Heads (&to)[3]) {
  for (int i = 0; i < 3; ++i)
    to[i] = {pointer(std::get<0>(from[i])), std::get<1>(from[i]), std::get<2>(from[i]), std::get<3>(from[i])};
}

void fill(const Norms& from, char* (&weight)[2], char* (&bias)[2]) {
  for (int i = 0; i < 2; ++i) {
    weight[i] = pointer(from[2 * i]);
    bias[i] = pointer(from[2 * i + 1]);
  }
}

Args inputs(const std::string& dtype, const Sizes& sizes, double eps, const PyRows& qkv, const Norms& norms,
            const Turns& turns) {
  Args args{};
  args.dtype = parse_dtype(dtype);
  args.batch = sizes[0];
  args.num_rows = sizes[1];
  args.num_text = sizes[2];
  args.num_heads = sizes[3];
  args.width = sizes[4];
  args.eps = eps;
  args.qkv = rows(qkv);
  fill(norms, args.weight, args.bias);
  args.cos = pointer(turns[0]);
  args.sin = pointer(turns[1]);
  return args;
}

void forward(const PyPlace& where, const std::string& dtype, const Sizes& sizes, double eps, const PyRows& qkv,
             const Norms& norms, const Turns& turns, bool rounded, const Three& y) {
  Args args = inputs(dtype, sizes, eps, qkv, norms, turns);
  args.rounded = rounded;
  fill(y, args.y);
  const Place at = place(where);
  const py::gil_scoped_release release;
  if (at.is_cuda)
    COGVX_ON_CUDA("qk_norm_rope", forward_cuda(args, at.device, at.stream));
  else
    COGVX_ON_THIS_CPU(forward(args, at.threads));
}

void backward(const PyPlace& where, const std::string& dtype, const Sizes& sizes, double eps, const PyRows& qkv,
              const Norms& norms, const Turns& turns, const Three& grad, const PyRows& grad_qkv,
              const Norms& grad_norms, const Turns& grad_turns, uintptr_t partials) {
  Args args = inputs(dtype, sizes, eps, qkv, norms, turns);
  fill(grad, args.grad);
  args.grad_qkv = rows(grad_qkv);
  fill(grad_norms, args.grad_weight, args.grad_bias);
  args.grad_cos = pointer(grad_turns[0]);
  args.grad_sin = pointer(grad_turns[1]);
  args.partials = reinterpret_cast<double*>(partials);
  const Place at = place(where);
  const py::gil_scoped_release release;
  if (at.is_cuda)
    COGVX_ON_CUDA("qk_norm_rope", backward_cuda(args, at.device, at.stream));
  else
    COGVX_ON_THIS_CPU(backward(args, at.threads));
}

}  // namespace
}  // namespace cogvx::qk_norm_rope

namespace cogvx {

void register_qk_norm_rope(py::module_& m) {
  m.attr("QK_NORM_ROPE_CHUNK") = qk_norm_rope::kChunk;
  m.def("qk_norm_rope_forward", &qk_norm_rope::forward);
  m.def("qk_norm_rope_backward", &qk_norm_rope::backward);
}

}  // namespace cogvx
