// The 16-bit types of CUDA, by the conversions of csrc/common/dtype.h.
#pragma once

#include "common/dtype.h"
#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
  operator float() const { return cogvx::widen(cogvx::Half{bits}); }
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;
inline float __half2float(__half value) { return cogvx::widen(cogvx::Half{value.bits}); }
inline __half __float2half_rn(float value) { return {cogvx::half_bits(value)}; }
inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
