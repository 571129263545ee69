// What every CUDA launcher does around a launch.
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

}  // namespace cogvx
