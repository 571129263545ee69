#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "joint_attention/joint_attention.h"

namespace py = pybind11;

namespace cogvx::joint_attention {
namespace {

using Sizes = std::array<int64_t, 4>;  // B, A, N, E
// On CPUs the lengths of the samples, which sum to N; on GPUs the address of the tiles, or 0, and their number.
using Tokens = std::tuple<std::vector<int64_t>, uintptr_t, int64_t>;

std::vector<Sample> samples_of(const Tokens& tokens) {
  std::vector<Sample> samples;
  int64_t first = 0;
  for (const int64_t count : std::get<0>(tokens)) {
    samples.push_back({first, count});
    first += count;
  }
  return samples;
}

Args inputs(const std::string& dtype, const Sizes& sizes, const std::vector<Sample>& samples, const Tokens& tokens,
            const PyHeads& q, const PyHeads& k, const PyHeads& v) {
  Args args{};
  args.dtype = parse_dtype(dtype);
  args.batch = sizes[0];
  args.num_heads = sizes[1];
  args.num_tokens = sizes[2];
  args.width = sizes[3];
  args.samples = samples.data();
  args.num_samples = static_cast<int64_t>(samples.size());
  args.tiles = reinterpret_cast<const int*>(std::get<1>(tokens));
  args.num_tiles = std::get<2>(tokens);
  args.q = heads(q);
  args.k = heads(k);
  args.v = heads(v);
  return args;
}

void forward(const PyPlace& where, const std::string& dtype, const Sizes& sizes, const Tokens& tokens, const PyHeads& q,
             const PyHeads& k, const PyHeads& v, const PyHeads& y, uintptr_t lse) {
  const std::vector<Sample> samples = samples_of(tokens);
  Args args = inputs(dtype, sizes, samples, tokens, q, k, v);
  args.y = heads(y);
  args.lse = pointer(lse);
  const Place at = place(where);
  const py::gil_scoped_release release;
  if (at.is_cuda)
    COGVX_ON_CUDA("joint_attention", forward_cuda(args, at.device, at.stream));
  else
    COGVX_ON_THIS_CPU(forward(args, at.threads));
}

void backward(const PyPlace& where, const std::string& dtype, const Sizes& sizes, const Tokens& tokens,
              const PyHeads& q, const PyHeads& k, const PyHeads& v, const PyHeads& grad, const PyHeads& grad_q,
              const PyHeads& grad_k, const PyHeads& grad_v, uintptr_t grad_lse, uintptr_t statistics) {
  const std::vector<Sample> samples = samples_of(tokens);
  Args args = inputs(dtype, sizes, samples, tokens, q, k, v);
  args.grad = heads(grad);
  args.grad_q = heads(grad_q);
  args.grad_k = heads(grad_k);
  args.grad_v = heads(grad_v);
  args.grad_lse = pointer(grad_lse);
  args.statistics = reinterpret_cast<float*>(statistics);
  const Place at = place(where);
  const py::gil_scoped_release release;
  if (at.is_cuda)
    COGVX_ON_CUDA("joint_attention", backward_cuda(args, at.device, at.stream));
  else
    COGVX_ON_THIS_CPU(backward(args, at.threads));
}

}  // namespace
}  // namespace cogvx::joint_attention

namespace cogvx {

void register_joint_attention(py::module_& m) {
  m.def("joint_attention_forward", &joint_attention::forward);
  m.def("joint_attention_backward", &joint_attention::backward);
  m.attr("JOINT_ATTENTION_TILE") = joint_attention::kOwned;
}

}  // namespace cogvx
