// What every CUDA launcher does: the tensor's own device, its stream, a check; nothing that waits or allocates.
#pragma once

#include <cuda_runtime.h>

namespace cogvx {

// Makes `device` current until the end of the scope. The runtime is linked statically, so it has its own idea of it.
struct DeviceGuard {
  int previous = 0;
  cudaError_t error;

  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&previous);
    if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
    if (error != cudaSuccess) cudaGetLastError();
  }
  ~DeviceGuard() {
    if (error == cudaSuccess) cudaSetDevice(previous);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Runs `kernel`, whose only parameter is `args`, with `shared` bytes of shared memory a block. Returns nullptr, or what
// went wrong. `launch<kernel<T>>(grid, threads, shared, stream, args)`.
template <auto kernel, class Args>
const char* launch(dim3 grid, dim3 threads, size_t shared, cudaStream_t stream, const Args& args) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared > kWithoutAsking) {
    const int bytes = static_cast<int>(shared);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return launch_error();
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
#ifdef HOST_CUDA
  config.name = __PRETTY_FUNCTION__;
#endif
  cudaLaunchKernelEx(&config, kernel, args);
  return launch_error();
}

}  // namespace cogvx
