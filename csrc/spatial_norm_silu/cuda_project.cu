// Scale and shift of every latent pixel, two 1x1x1 convolutions: [pixels, C_z] times [C_z, 2 C], and the biases.
#include <cstring>

#include "common/by_dtype.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "spatial_norm_silu/spatial_norm_silu.h"

namespace cogvx::spatial_norm_silu {
namespace {

// A block's warps share kOutputs results of kPixels pixels: each thread has kOfThread by kOfThread of them.
constexpr int kThreads = 256, kOfThread = 8, kDepth = 16;
constexpr int kOutputs = 32 * kOfThread, kPixels = kThreads / 32 * kOfThread;

struct Shared {
  float weights[kDepth][kOutputs];
  float pixels[kDepth][kPixels];
};

// Where an output's weights stand in a row: so that a warp's loads of 16 bytes meet every bank once.
__device__ int column_of(int output) {
  return output % kOfThread / 4 * (kOutputs / 2) + output / kOfThread * 4 + output % 4;
}

// Value i of two tensors one behind the other, the first of `count` values.
template <class T> __device__ float joined(const char* first, const char* second, int64_t i, int64_t count) {
  const T* values = reinterpret_cast<const T*>(i < count ? first : second);
  return to_accumulator(values[i < count ? i : i - count]);
}

// kDepth channels of the latent from `start` on, of the block's outputs and pixels; zeros beyond the ends.
template <class T> __device__ void load(const LatentArgs& args, Shared& shared, int64_t start) {
  static_assert(kThreads == kOutputs && kDepth * kPixels % kThreads == 0);
  const int64_t output = static_cast<int64_t>(blockIdx.y) * kOutputs + threadIdx.x;
  const int column = column_of(static_cast<int>(threadIdx.x));
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    const bool is_inside = output < 2 * args.channels && start + k < args.depth;
    const int64_t i = output * args.depth + start + k;
    shared.weights[k][column] = is_inside ? joined<T>(args.weight_y, args.weight_b, i, args.channels * args.depth) : 0;
  }
#pragma unroll
  for (int i = threadIdx.x; i < kDepth * kPixels; i += kThreads) {
    const int k = i % kDepth;
    const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kPixels + i / kDepth;
    const bool is_inside = pixel < args.pixels && start + k < args.depth;
    const T* z = reinterpret_cast<const T*>(args.z) + pixel * args.depth + start + k;
    shared.pixels[k][i / kDepth] = is_inside ? to_accumulator(*z) : 0.0f;
  }
}

template <class T, int kVec> __device__ void store(T* to, const Vec<T, kVec>& values) {
  if constexpr (kVec == 1) {
    *to = values.v[0];
  } else {
    uint4 whole;
    memcpy(&whole, &values, sizeof whole);
    __stwb(reinterpret_cast<uint4*>(to), whole);  // an assignment would be taken apart by the compiler
  }
}

template <class T, int kVec> __global__ void __launch_bounds__(kThreads, 2) project_kernel(LatentArgs args) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sums[kOfThread][kOfThread] = {};  // by pixel and output
  for (int64_t start = 0; start < args.depth; start += kDepth) {
    load<T>(args, shared, start);
    __syncthreads();
#pragma unroll 2
    for (int k = 0; k < kDepth; ++k) {
      const auto pixels = *reinterpret_cast<const Vec<float, kOfThread>*>(shared.pixels[k] + warp * kOfThread);
      const auto low = *reinterpret_cast<const Vec<float, 4>*>(shared.weights[k] + lane * 4);
      const auto high = *reinterpret_cast<const Vec<float, 4>*>(shared.weights[k] + kOutputs / 2 + lane * 4);
#pragma unroll
      for (int p = 0; p < kOfThread; ++p)
#pragma unroll
        for (int o = 0; o < kOfThread; ++o) sums[p][o] += pixels.v[p] * (o < 4 ? low.v[o % 4] : high.v[o % 4]);
    }
    __syncthreads();
  }
  const int64_t width = 2 * args.channels, first = static_cast<int64_t>(blockIdx.y) * kOutputs + lane * kOfThread;
#pragma unroll
  for (int o = 0; o < kOfThread; o += kVec) {
    if (first + o >= width) break;
    float bias[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) bias[k] = joined<T>(args.bias_y, args.bias_b, first + o + k, args.channels);
    const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kPixels + warp * kOfThread;
    T* to = reinterpret_cast<T*>(args.latent) + pixel * width + first + o;
#pragma unroll
    for (int p = 0; p < kOfThread; ++p, to += width) {
      Vec<T, kVec> result;
#pragma unroll
      for (int k = 0; k < kVec; ++k) result.v[k] = from_accumulator<T>(sums[p][o + k] + bias[k]);
      if (pixel + p < args.pixels) store(to, result);
    }
  }
}

template <class T> const char* run(const LatentArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((args.pixels + kPixels - 1) / kPixels),
                  static_cast<unsigned>((2 * args.channels + kOutputs - 1) / kOutputs));
  if (args.channels * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(args.latent) % 16 == 0)
    return launch<project_kernel<T, 16 / sizeof(T)>>(grid, kThreads, sizeof(Shared), stream, args);
  return launch<project_kernel<T, 1>>(grid, kThreads, sizeof(Shared), stream, args);
}

}  // namespace

const char* project_cuda(const LatentArgs& args, int device, uintptr_t address) {
  return by_dtype(args.dtype, device, address, [&](auto zero, cudaStream_t stream) {
    return run<decltype(zero)>(args, stream);
  });
}

}  // namespace cogvx::spatial_norm_silu
