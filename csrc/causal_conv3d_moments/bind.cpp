#include "causal_conv3d_moments/causal_conv3d_moments.h"
#include "common/convolution_bind.h"

namespace py = pybind11;

namespace cogvx::causal_conv3d_moments {
namespace {

// Sizes are B, C, parts and parts a group.
void merge(const PyPlace& where, const std::array<int64_t, 4>& sizes, uintptr_t from, uintptr_t to) {
  [[maybe_unused]] const Merge args{reinterpret_cast<const float*>(from), reinterpret_cast<float*>(to),
                                    static_cast<int>(sizes[0]), static_cast<int>(sizes[1]), sizes[2], sizes[3]};
  [[maybe_unused]] const Place at = place(where);
  const py::gil_scoped_release release;
  COGVX_ON_CUDA("causal_conv3d_moments", merge_cuda(args, at.device, at.stream));
}

}  // namespace
}  // namespace cogvx::causal_conv3d_moments

namespace cogvx {

void register_causal_conv3d_moments(py::module_& m) {
  m.def("causal_conv3d_moments_tiles", &causal_conv3d_moments::num_tiles);
  m.def("causal_conv3d_moments_merge", &causal_conv3d_moments::merge);
  define_convolution<causal_conv3d_moments::forward_cuda>(m, "causal_conv3d_moments_forward");
}

}  // namespace cogvx
