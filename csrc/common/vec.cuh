// A row spread over the threads of a block: vector loads and stores, and sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"

namespace cogvx {

template <class T, int kVec> struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Vec {
  T v[kVec];
};

__device__ inline float to_accumulator(float value) { return value; }
__device__ inline float to_accumulator(__half value) { return __half2float(value); }
__device__ inline float to_accumulator(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T> __device__ T from_accumulator(float value);
template <> __device__ inline float from_accumulator<float>(float value) { return value; }
template <> __device__ inline __half from_accumulator<__half>(float value) { return __float2half_rn(value); }
template <> __device__ inline __nv_bfloat16 from_accumulator<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Where a thread's vectors of a row stand: a warp's side by side, so that one address and constants find them all. The
// row is the whole block's, or, where kLanes is not 0, that of so many neighbours in a warp.
template <int kVec, int kSlots, int kLanes> __device__ int column_of(int slot) {
  if constexpr (kLanes > 0) return (static_cast<int>(threadIdx.x % kLanes) + slot * kLanes) * kVec;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return (warp * kSlots * 32 + lane) * kVec + slot * 32 * kVec;
}

// What one thread holds of a row, as it is in memory: rows are asked for long before they are needed.
template <class T, int kVec, int kSlots, int kLanes> struct Packed {
  Vec<T, kVec> v[kSlots];

  __device__ void load(const T* row, int width) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      v[s] = {};
      const int column = column_of<kVec, kSlots, kLanes>(s);
      if (column < width) v[s] = *reinterpret_cast<const Vec<T, kVec>*>(row + column);
    }
  }

  __device__ void store(T* row, int width) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int column = column_of<kVec, kSlots, kLanes>(s);
      if (column < width) *reinterpret_cast<Vec<T, kVec>*>(row + column) = v[s];
    }
  }
};

// The values of a row that one thread holds: kSlots vectors of kVec. The width is a multiple of kVec; what lies beyond
// it stays 0, so that sums need no mask.
template <int kVec, int kSlots, int kLanes = 0> struct Values {
  template <class T> using Packed = cogvx::Packed<T, kVec, kSlots, kLanes>;

  float v[kSlots][kVec];

  static __device__ int column(int slot) { return column_of<kVec, kSlots, kLanes>(slot); }

  template <class T> __device__ void unpack(const Packed<T>& packed) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
#pragma unroll
      for (int k = 0; k < kVec; ++k) v[s][k] = to_accumulator(packed.v[s].v[k]);
  }

  template <class T> __device__ void load(const T* row, int width) {
    Packed<T> packed;
    packed.load(row, width);
    unpack(packed);
  }

  template <class T> __device__ void store(T* row, int width) const {
    Packed<T> packed;
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
#pragma unroll
      for (int k = 0; k < kVec; ++k) packed.v[s].v[k] = from_accumulator<T>(v[s][k]);
    packed.store(row, width);
  }

  // v = f(others...), value by value, inside the row.
  template <class F, class... Others> __device__ void set(int width, F f, const Others&... others) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
#pragma unroll
      for (int k = 0; k < kVec; ++k) v[s][k] = column(s) < width ? f(others.v[s][k]...) : 0.0f;
  }

  // The sum of f(v, others...), over this thread's values.
  template <class F, class... Others> __device__ float sum(F f, const Others&... others) const {
    float total = 0.0f;
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
#pragma unroll
      for (int k = 0; k < kVec; ++k) total += f(v[s][k], others.v[s][k]...);
    return total;
  }
};

// The sum over kLanes neighbours of a warp, all of whose lanes take part; each gets it.
template <int kLanes> __device__ float sum_of_lanes(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Sums over a block of whole warps, in an order that never changes; every thread gets the results. Calls alternate
// between two buffers, so that one barrier a call is enough.
class BlockSum {
 public:
  struct Shared {
    float v[2][2][32];  // buffer, value, warp
  };

  __device__ explicit BlockSum(Shared& shared) : shared_(shared) {}

  template <int kCount> __device__ void operator()(float (&values)[kCount]) {
    static_assert(kCount <= 2, "Shared holds two values");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      values[c] = sum_of_lanes<32>(values[c]);
      if (lane == 0) shared_.v[turn_][c][warp] = values[c];
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      values[c] = 0.0f;
      for (int w = 0; w < num_warps; ++w) values[c] += shared_.v[turn_][c][w];
    }
    turn_ ^= 1;
  }

  __device__ float operator()(float value) {
    float values[1] = {value};
    (*this)(values);
    return values[0];
  }

 private:
  Shared& shared_;
  int turn_ = 0;
};

}  // namespace cogvx
