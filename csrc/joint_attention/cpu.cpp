// Compiled once for each instruction set (COGVX_ISA names it). No standard containers here: their code would be shared
// between the variants, and one compiled for a newer processor could be linked into all.
#include "joint_attention/cpu_backward.h"
#include "joint_attention/cpu_forward.h"
#include "joint_attention/joint_attention.h"

namespace cogvx::joint_attention::COGVX_ISA {

void forward(const Args& args, int num_threads) {
  switch (args.dtype) {
    case DType::float32: return forward_as<float>(args, num_threads);
    case DType::float16: return forward_as<Half>(args, num_threads);
    case DType::bfloat16: return forward_as<BFloat16>(args, num_threads);
    case DType::float64: return forward_as<double>(args, num_threads);
  }
}

void backward(const Args& args, int num_threads) {
  switch (args.dtype) {
    case DType::float32: return backward_as<float>(args, num_threads);
    case DType::float16: return backward_as<Half>(args, num_threads);
    case DType::bfloat16: return backward_as<BFloat16>(args, num_threads);
    case DType::float64: return backward_as<double>(args, num_threads);
  }
}

}  // namespace cogvx::joint_attention::COGVX_ISA
