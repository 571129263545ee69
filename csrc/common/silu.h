// SiLU, v / (1 + e^-v), and its derivative, in arithmetic that turns into vector code on any target.
//
// Functions here are `static`: every instruction set gets its own copy, and none can be linked into another's code.
#pragma once

#include <math.h>

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace cogvx {

constexpr float kLog2E = 0x1.715476p+0f, kLog2ERest = 0x1.4ae0bfp-26f;  // the second for results of float alone

// 2^f for |f| <= 1/2: within 3e-6 of itself for results of 16 bits, 8e-8 for those of float.
constexpr float kPower16[5] = {0x1.ffffe8p-1f, 0x1.62e0dap-1f, 0x1.ec06e2p-3f, 0x1.ca154ap-5f, 0x1.39975ap-7f};
constexpr float kPower32[7] = {0x1.000000p+0f, 0x1.62e430p-1f, 0x1.ebfbdap-3f, 0x1.c6aed4p-5f,
                               0x1.3b2dbep-7f, 0x1.5f45f2p-10f, 0x1.41d2d4p-13f};

template <class T> static inline float power_of_fraction(float f) {
  const float* c = sizeof(T) == 2 ? kPower16 : kPower32;
  if (sizeof(T) == 2) return c[0] + f * (c[1] + f * (c[2] + f * (c[3] + f * c[4])));
  return c[0] + f * (c[1] + f * (c[2] + f * (c[3] + f * (c[4] + f * (c[5] + f * kPower32[6])))));
}

// e^x for results of type T: 2^n 2^f with an integer n. Infinite from 88.4 on; never below 2^-126.
template <class T> static inline float exponential(float x) {
  const float above = x < -87.3f ? -87.3f : x, clamped = above > 89.0f ? 89.0f : above;  // a NaN stays one
  const float shifted = clamped * kLog2E + 0x1.8p23f;  // n in the lowest bits: floats are whole numbers here
  float f = clamped * kLog2E - (shifted - 0x1.8p23f);
  if (sizeof(T) == 4) f += clamped * kLog2ERest;
  return from_bits((as_bits(shifted) + 127u) << 23) * power_of_fraction<T>(f);
}

template <class T> static inline double exponential(double x) { return exp(x); }

template <class T, class A> static inline A silu(A v) { return v / (1 + exponential<T>(-v)); }

template <class T, class A> static inline A silu_derivative(A v) {
  const A e = exponential<T>(v < -88 ? A{88} : -v), s = 1 / (1 + e);  // e is finite, so that e * s is 1 - s
  return s * (1 + v * (e * s));
}

#if defined(__AVX512F__)

// The same, sixteen values at a time. Intrinsics have a mask of ones because GCC 12 warns of its own header without.
template <class T> static inline __m512 silu(__m512 v) {
  constexpr __mmask16 kAll = 0xffff;
  const __m512 factor = _mm512_set1_ps(-kLog2E), t = _mm512_mul_ps(v, factor);
  __m512 power;  // e^-v
  if (sizeof(T) == 2) {
    // 2^f for 0 <= f <= 1, within 8e-5 of itself or 3e-6; scalef multiplies by 2^floor(t).
    constexpr float kOf8Bits[4] = {0x1.fff632p-1f, 0x1.64444cp-1f, 0x1.cefc4cp-3f, 0x1.3f96a4p-4f};
    constexpr float kOf11Bits[5] = {0x1.00002cp+0f, 0x1.62d166p-1f, 0x1.ee798ap-3f, 0x1.aa13f0p-5f, 0x1.bb7cd4p-7f};
    constexpr bool k8Bits = std::is_same<T, BFloat16>::value;
    constexpr int kDegree = k8Bits ? 3 : 4;
    const float* c = k8Bits ? kOf8Bits : kOf11Bits;
    const __m512 f = _mm512_maskz_reduce_ps(kAll, t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    power = _mm512_set1_ps(c[kDegree]);
#pragma GCC unroll 4
    for (int i = kDegree - 1; i >= 0; --i) power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(c[i]));
    power = _mm512_maskz_scalef_ps(kAll, power, t);
  } else {
    // Beyond, e^-v is lost beside 1, or the result is 0; the second operand is the result where it is a NaN.
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m512 low = _mm512_set1_ps(-89.0f), high = _mm512_set1_ps(87.3f);
    const __m512 x = _mm512_maskz_min_ps(kAll, high, _mm512_maskz_max_ps(kAll, low, v));
    const __m512 n = _mm512_maskz_roundscale_ps(kAll, _mm512_mul_ps(x, factor), kNearest);
    __m512 f = _mm512_fmsub_ps(x, factor, n);
    f = _mm512_fmadd_ps(x, _mm512_set1_ps(-kLog2ERest), f);
    power = _mm512_set1_ps(kPower32[6]);
#pragma GCC unroll 6
    for (int i = 5; i >= 0; --i) power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(kPower32[i]));
    power = _mm512_maskz_scalef_ps(kAll, power, n);
  }
  return _mm512_div_ps(v, _mm512_add_ps(_mm512_set1_ps(1.0f), power));
}

// Sixteen values side by side.
static inline __m512 load16(const float* from) { return _mm512_loadu_ps(from); }
static inline __m512 load16(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, bits), 16));
}
static inline __m512 load16(const Half* from) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

static inline void store16(float* to, __m512 values) { _mm512_storeu_ps(to, values); }
static inline void store16(Half* to, __m512 values) {
  const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
}
static inline void store16(BFloat16* to, __m512 values) {
#if defined(__AVX512BF16__)
  const __m256bh bits = _mm512_cvtneps_pbh(values);
#else
  constexpr __mmask16 kAll = 0xffff;
  const __m512i from = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(kAll, from, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(from, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  const __m256i bits = _mm512_maskz_cvtepi32_epi16(kAll, _mm512_maskz_srli_epi32(kAll, result, 16));
#endif
  std::memcpy(to, &bits, sizeof bits);
}

#endif

}  // namespace cogvx
