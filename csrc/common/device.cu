// Whether a CUDA device runs what was compiled here. The build compiles this file first, as its probe of the toolchain.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/device.h"
#include "common/launch.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "the kernels consist of instructions that GPUs have from compute capability 8.0 on"
#endif

namespace cogvx {
namespace {

__global__ void probe(float* out) {
  *out = __bfloat162float(__float2bfloat16(1.0f)) + __half2float(__float2half(1.0f));
}

}  // namespace

const char* why_not_cuda(int device) {
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return cudaGetErrorString(guard.error);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe));
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // so that no later call reports it again
  return cudaGetErrorString(error);
}

}  // namespace cogvx

#ifdef COGVX_PROBE
int main() { return 0; }
#endif
