// The 16-bit types of CUDA, by the conversions of csrc/common/dtype.h.
#pragma once

#include "common/dtype.h"
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  unsigned short bits;
  operator float() const { return cogvx::widen(cogvx::BFloat16{bits}); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 value) { return cogvx::widen(cogvx::BFloat16{value.bits}); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {cogvx::bfloat16_bits(value)}; }
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {__bfloat162float(pair.x), __bfloat162float(pair.y)}; }
