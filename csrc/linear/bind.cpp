#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "linear/linear.h"

namespace py = pybind11;

namespace cogvx::linear {
namespace {

using Sizes = std::array<int64_t, 3>;  // M, N, K

int64_t packed_bytes_on_this_cpu(const std::string& dtype, const Sizes& sizes) {
  Args args{};
  args.dtype = parse_dtype(dtype);
  args.n = sizes[1];
  args.k = sizes[2];
  int64_t bytes = 0;
  COGVX_ON_THIS_CPU(packed_bytes(args, &bytes));
  return bytes;
}

void multiply(int threads, const std::string& dtype, const Sizes& sizes, const PyRows& a, const PyRows& b,
              uintptr_t bias, bool gelu, uintptr_t grad, uintptr_t c, uintptr_t packed) {
  const auto matrix = [](const PyRows& from) {
    return Matrix{pointer(std::get<0>(from)), std::get<1>(from), std::get<2>(from)};
  };
  Args args{};
  args.dtype = parse_dtype(dtype);
  args.m = sizes[0];
  args.n = sizes[1];
  args.k = sizes[2];
  args.a = matrix(a);
  args.b = matrix(b);
  args.bias = pointer(bias);
  args.gelu = gelu;
  args.grad = pointer(grad);
  args.c = pointer(c);
  args.packed = pointer(packed);
  const py::gil_scoped_release release;
  COGVX_ON_THIS_CPU(multiply(args, threads));
}

}  // namespace
}  // namespace cogvx::linear

namespace cogvx {

void register_linear(py::module_& m) {
  m.def("linear_packed_bytes", &linear::packed_bytes_on_this_cpu);
  m.def("linear_multiply", &linear::multiply);
}

}  // namespace cogvx
