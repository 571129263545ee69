// How a launcher gets from a tensor's dtype to the kernel that is compiled for it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/launch.cuh"

namespace cogvx {

// On the tensor's own device: run(zero, stream), with a zero of the type that `dtype` is on GPUs. Returns what run
// does, nullptr or what went wrong.
template <class Run> const char* by_dtype(DType dtype, int device, uintptr_t stream_address, Run run) {
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  if (dtype == DType::float32) return run(float{}, stream);
  if (dtype == DType::float16) return run(__half{}, stream);
  if (dtype == DType::bfloat16) return run(__nv_bfloat16{}, stream);
  return "a dtype that is not compiled";
}

}  // namespace cogvx
