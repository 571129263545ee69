// What the kernels use of the CUDA runtime and of the device's built-in names, on the execution model of machine.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <typeinfo>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __constant__

// threadIdx.x and its like, each asking the machine.
#define HOST_CUDA_INDEX(name, value)                                                \
  inline constexpr struct {                                                         \
    struct X { operator unsigned() const { return ::host_cuda::value().x; } } x;    \
    struct Y { operator unsigned() const { return ::host_cuda::value().y; } } y;    \
    struct Z { operator unsigned() const { return ::host_cuda::value().z; } } z;    \
  } name{}
HOST_CUDA_INDEX(threadIdx, current_index);
HOST_CUDA_INDEX(blockIdx, block_index);
HOST_CUDA_INDEX(blockDim, block_size);
HOST_CUDA_INDEX(gridDim, grid_size);
#undef HOST_CUDA_INDEX

using std::max;
using std::min;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Arithmetic.
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;  // never part of a fused sum
  return product;
}
inline float __fadd_rn(float a, float b) {
  volatile float sum = a + b;
  return sum;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
template <class To, class From> To host_cuda_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return host_cuda_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return host_cuda_bits<float>(x); }
inline int __float_as_int(float x) { return host_cuda_bits<int>(x); }
inline float __int_as_float(int x) { return host_cuda_bits<float>(x); }
template <class T> T __ldg(const T* address) { return *address; }
template <class T> void __stwb(T* address, T value) { *address = value; }

// Barriers and warps.
inline void __syncthreads() { ::host_cuda::barrier(0, 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  ::host_cuda::collective(::host_cuda::Collective::sync, mask, nullptr, nullptr, nullptr, nullptr);
}

namespace host_cuda {

template <class T> struct Offer {
  T value;
  int source;
};

template <class T> T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  const Offer<T> offer{value, source};
  T result;
  collective(
      Collective::shuffle, mask, &offer, &result,
      [](const void* const* in, void* const* out, unsigned lanes, const void*) HOST_CUDA_UNWATCHED {
        for (int lane = 0; lane < 32; ++lane) {
          if (!(lanes >> lane & 1)) continue;
          const int from = static_cast<const Offer<T>*>(in[lane])->source;
          if (!(lanes >> from & 1)) fail("lane %d reads by a shuffle from lane %d, which the mask leaves out", lane, from);
          *static_cast<T*>(out[lane]) = static_cast<const Offer<T>*>(in[from])->value;
        }
      },
      nullptr);
  return result;
}

inline unsigned vote(unsigned mask, bool value) {
  unsigned result;
  collective(
      Collective::vote, mask, &value, &result,
      [](const void* const* in, void* const* out, unsigned lanes, const void*) HOST_CUDA_UNWATCHED {
        unsigned all = 0;
        for (int lane = 0; lane < 32; ++lane)
          if (lanes >> lane & 1) all |= static_cast<unsigned>(*static_cast<const bool*>(in[lane])) << lane;
        for (int lane = 0; lane < 32; ++lane)
          if (lanes >> lane & 1) *static_cast<unsigned*>(out[lane]) = all;
      },
      nullptr);
  return result;
}

}  // namespace host_cuda

template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = ::host_cuda::current_lane(), base = lane / width * width;
  return ::host_cuda::shuffle(mask, value, base + source % width);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = ::host_cuda::current_lane(), source = lane ^ bits;
  return ::host_cuda::shuffle(mask, value, source / width == lane / width ? source : lane);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = ::host_cuda::current_lane(), source = lane + static_cast<int>(by);
  return ::host_cuda::shuffle(mask, value, source / width == lane / width ? source : lane);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = ::host_cuda::current_lane(), source = lane - static_cast<int>(by);
  return ::host_cuda::shuffle(mask, value, source >= lane / width * width ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool value) { return ::host_cuda::vote(mask, value); }
inline int __any_sync(unsigned mask, bool value) { return ::host_cuda::vote(mask, value) != 0; }
inline int __all_sync(unsigned mask, bool value) { return ::host_cuda::vote(mask, value) == mask; }

// The runtime.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };

namespace host_cuda {
inline const char* last_error = nullptr;  // what run() said
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaGetLastError() { return ::host_cuda::last_error ? cudaErrorLaunchFailure : cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  static char text[1024];
  const char* said = ::host_cuda::last_error;
  ::host_cuda::last_error = nullptr;
  snprintf(text, sizeof text, "%s", error == cudaSuccess ? "no error" : said ? said : "an error");
  return text;
}

struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class F> cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) { return cudaSuccess; }

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 4;  // few, so that persistent kernels take several tiles each
  return cudaSuccess;
}

struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
  const char* name = "a kernel";  // the stand-in's own, for its messages
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... args) {
  const std::function<void()> body = [&] { kernel(args...); };
  ::host_cuda::last_error =
      ::host_cuda::run(config->name, config->gridDim, config->blockDim, config->dynamicSmemBytes, body);
  return cudaGetLastError();
}
