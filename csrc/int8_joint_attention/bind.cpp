#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "int8_joint_attention/int8_joint_attention.h"

namespace py = pybind11;

namespace cogvx::int8_joint_attention {
namespace {

using joint_attention::PyHeads;
using Sizes = std::array<int64_t, 4>;               // B, A, N, E
using PyGroups = std::pair<uintptr_t, uintptr_t>;  // addresses of integers and of their scales

void forward(const PyPlace& where, const std::string& dtype, const Sizes& sizes, const PyHeads& q, const PyHeads& k,
             const PyHeads& v, const PyHeads& y, uintptr_t mean, const PyGroups& q8, const PyGroups& k8) {
  Args args{};
  args.dtype = parse_dtype(dtype);
  args.batch = sizes[0];
  args.num_heads = sizes[1];
  args.num_tokens = sizes[2];
  args.width = sizes[3];
  args.num_tiles = (args.num_tokens + kQueries - 1) / kQueries;
  args.q = joint_attention::heads(q);
  args.k = joint_attention::heads(k);
  args.v = joint_attention::heads(v);
  args.y = joint_attention::heads(y);
  args.mean = reinterpret_cast<const float*>(mean);
  args.q8 = reinterpret_cast<int8_t*>(q8.first);
  args.q_scales = reinterpret_cast<float*>(q8.second);
  args.k8 = reinterpret_cast<int8_t*>(k8.first);
  args.k_scales = reinterpret_cast<float*>(k8.second);
  const Place at = place(where);
  const py::gil_scoped_release release;
  COGVX_ON_CUDA("int8_joint_attention", forward_cuda(args, at.device, at.stream));
}

}  // namespace
}  // namespace cogvx::int8_joint_attention

namespace cogvx {

void register_int8_joint_attention(py::module_& m) {
  m.def("int8_joint_attention_row_bytes", &int8_joint_attention::row_bytes);
  m.def("int8_joint_attention_forward", &int8_joint_attention::forward);
}

}  // namespace cogvx
