// cogvx_kernels._C: one register function an operator, and what was built in.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "common/device.h"
#include "common/isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace cogvx {

void register_causal_conv3d(py::module_& m);
void register_causal_conv3d_moments(py::module_& m);
void register_downsample_conv(py::module_& m);
void register_expert_layernorm(py::module_& m);
void register_gated_expert_layernorm(py::module_& m);
void register_group_norm_silu(py::module_& m);
void register_int8_joint_attention(py::module_& m);
void register_joint_attention(py::module_& m);
void register_linear(py::module_& m);
void register_qk_norm_rope(py::module_& m);
void register_spatial_norm_silu(py::module_& m);
void register_upsample_conv(py::module_& m);

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

py::dict built_with() {
  py::dict result;
  result["compiler"] = compiler();
#ifdef _OPENMP
  result["openmp"] = std::to_string(_OPENMP);  // the date of the standard
#else
  result["openmp"] = py::none();
#endif
  result["cpu_isas"] = isa_names();
  result["cpu_isa"] = isa_names()[static_cast<int>(chosen_isa())];
#ifdef COGVX_CUDA_VERSION
  result["cuda"] = COGVX_CUDA_VERSION;
  result["cuda_archs"] = COGVX_CUDA_ARCHS;
  result["cuda_reason"] = py::none();
#else
  result["cuda"] = py::none();
  result["cuda_archs"] = py::none();
  result["cuda_reason"] = COGVX_CUDA_REASON;
#endif
  result["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
  return result;
}

py::object why_not_cuda_object(int device) {
#ifdef COGVX_CUDA_VERSION
  const char* reason = why_not_cuda(device);
  return reason ? py::object(py::str(reason)) : py::object(py::none());
#else
  (void)device;
  return py::str("the extension was built without CUDA: " COGVX_CUDA_REASON);
#endif
}

}  // namespace
}  // namespace cogvx

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of cogvx_kernels: addresses and sizes in, nothing of torch.";
  m.def("built_with", &cogvx::built_with, "What the extension was compiled with, and which CPU variant runs here.");
  m.def("why_not_cuda", &cogvx::why_not_cuda_object, "Why a CUDA device cannot run the extension's kernels, or None.");
  cogvx::register_causal_conv3d(m);
  cogvx::register_causal_conv3d_moments(m);
  cogvx::register_downsample_conv(m);
  cogvx::register_expert_layernorm(m);
  cogvx::register_gated_expert_layernorm(m);
  cogvx::register_group_norm_silu(m);
  cogvx::register_int8_joint_attention(m);
  cogvx::register_joint_attention(m);
  cogvx::register_linear(m);
  cogvx::register_qk_norm_rope(m);
  cogvx::register_spatial_norm_silu(m);
  cogvx::register_upsample_conv(m);
}
