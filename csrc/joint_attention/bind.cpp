#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "common/place.h"
#include "joint_attention/joint_attention.h"

namespace py = pybind11;

namespace cogvx::joint_attention {
namespace {

using Sizes = std::array<int64_t, 4>;                                 // B, A, N, E
using PyHeads = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;     // address, strides
using Lengths = std::vector<int64_t>;                                 // of the samples; they sum to N

Heads heads(const PyHeads& from) {
  return {pointer(std::get<0>(from)), std::get<1>(from), std::get<2>(from), std::get<3>(from)};
}

std::vector<Sample> samples_of(const Lengths& lengths) {
  std::vector<Sample> samples;
  int64_t first = 0;
  for (const int64_t count : lengths) {
    samples.push_back({first, count});
    first += count;
  }
  return samples;
}

Args inputs(const std::string& dtype, const Sizes& sizes, const std::vector<Sample>& samples, const PyHeads& q,
            const PyHeads& k, const PyHeads& v) {
  Args args{};
  args.dtype = parse_dtype(dtype);
  args.batch = sizes[0];
  args.num_heads = sizes[1];
  args.num_tokens = sizes[2];
  args.width = sizes[3];
  args.samples = samples.data();
  args.num_samples = static_cast<int64_t>(samples.size());
  args.q = heads(q);
  args.k = heads(k);
  args.v = heads(v);
  return args;
}

void forward(int threads, const std::string& dtype, const Sizes& sizes, const Lengths& lengths, const PyHeads& q,
             const PyHeads& k, const PyHeads& v, const PyHeads& y) {
  const std::vector<Sample> samples = samples_of(lengths);
  Args args = inputs(dtype, sizes, samples, q, k, v);
  args.y = heads(y);
  const py::gil_scoped_release release;
  COGVX_ON_THIS_CPU(forward(args, threads));
}

void backward(int threads, const std::string& dtype, const Sizes& sizes, const Lengths& lengths, const PyHeads& q,
              const PyHeads& k, const PyHeads& v, const PyHeads& grad, const PyHeads& grad_q, const PyHeads& grad_k,
              const PyHeads& grad_v) {
  const std::vector<Sample> samples = samples_of(lengths);
  Args args = inputs(dtype, sizes, samples, q, k, v);
  args.grad = heads(grad);
  args.grad_q = heads(grad_q);
  args.grad_k = heads(grad_k);
  args.grad_v = heads(grad_v);
  const py::gil_scoped_release release;
  COGVX_ON_THIS_CPU(backward(args, threads));
}

using Tiles = std::pair<uintptr_t, int64_t>;  // address, or 0, and number

Args inputs_on_cuda(const std::string& dtype, const Sizes& sizes, const Tiles& tiles, const PyHeads& q, const PyHeads& k,
                    const PyHeads& v) {
  Args args = inputs(dtype, sizes, {}, q, k, v);
  args.tiles = reinterpret_cast<const int*>(tiles.first);
  args.num_tiles = tiles.second;
  return args;
}

void forward_on_cuda(const PyPlace& where, const std::string& dtype, const Sizes& sizes, const Tiles& tiles,
                     const PyHeads& q, const PyHeads& k, const PyHeads& v, const PyHeads& y) {
  Args args = inputs_on_cuda(dtype, sizes, tiles, q, k, v);
  args.y = heads(y);
  const Place at = place(where);
  const py::gil_scoped_release release;
  COGVX_ON_CUDA("joint_attention", forward_cuda(args, at.device, at.stream));
}

void backward_on_cuda(const PyPlace& where, const std::string& dtype, const Sizes& sizes, const Tiles& tiles,
                      const PyHeads& q, const PyHeads& k, const PyHeads& v, const PyHeads& grad, const PyHeads& grad_q,
                      const PyHeads& grad_k, const PyHeads& grad_v, uintptr_t statistics) {
  Args args = inputs_on_cuda(dtype, sizes, tiles, q, k, v);
  args.grad = heads(grad);
  args.grad_q = heads(grad_q);
  args.grad_k = heads(grad_k);
  args.grad_v = heads(grad_v);
  args.statistics = reinterpret_cast<float*>(statistics);
  const Place at = place(where);
  const py::gil_scoped_release release;
  COGVX_ON_CUDA("joint_attention", backward_cuda(args, at.device, at.stream));
}

}  // namespace
}  // namespace cogvx::joint_attention

namespace cogvx {

void register_joint_attention(py::module_& m) {
  m.def("joint_attention_forward", &joint_attention::forward);
  m.def("joint_attention_backward", &joint_attention::backward);
  m.attr("JOINT_ATTENTION_TILE") = joint_attention::kOwned;
  m.def("joint_attention_forward_cuda", &joint_attention::forward_on_cuda);
  m.def("joint_attention_backward_cuda", &joint_attention::backward_on_cuda);
}

}  // namespace cogvx
