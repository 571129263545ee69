// A register of floats, where there are AVX2 or AVX-512: loads, stores and 2^t. Sums and products are the compiler's
// own operators.
//
// Functions here are `static`: every instruction set gets its own copy, and none can be linked into another's code.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>

namespace cogvx {

// 2^f for 0 <= f <= 1, within 8e-5 of itself, 3e-6 or 7e-8: coefficients for results of 8, 11 and 24 bits.
template <class T> struct PowerOfFraction;
template <> struct PowerOfFraction<BFloat16> {
  static constexpr int degree = 3;
  static constexpr float of[] = {0x1.fff632p-1f, 0x1.64444cp-1f, 0x1.cefc4cp-3f, 0x1.3f96a4p-4f};
};
template <> struct PowerOfFraction<Half> {
  static constexpr int degree = 4;
  static constexpr float of[] = {0x1.00002cp+0f, 0x1.62d166p-1f, 0x1.ee798ap-3f, 0x1.aa13f0p-5f, 0x1.bb7cd4p-7f};
};
template <> struct PowerOfFraction<float> {
  static constexpr int degree = 6;
  static constexpr float of[] = {0x1.000000p+0f, 0x1.62e42ap-1f, 0x1.ebfd9ep-3f, 0x1.c68500p-5f,
                                 0x1.3d2800p-7f, 0x1.461954p-10f, 0x1.c72118p-13f};
};

#if defined(__AVX512F__)

// Intrinsics have a mask of ones because GCC 12 warns of its own header without.
using Floats = __m512;
constexpr __mmask16 kAllFloats = 0xffff;

static inline Floats spread(float value) { return _mm512_set1_ps(value); }

static inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
static inline Floats load(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(kAllFloats, bits);
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAllFloats, wide, 16));
}
static inline Floats load(const Half* from) {
  return _mm512_maskz_cvtph_ps(kAllFloats, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// To the nearest, ties to even.
static inline __m256i rounded(const Half*, Floats values) {
  return _mm512_maskz_cvtps_ph(kAllFloats, values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline __m256i rounded(const BFloat16*, Floats values) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
#else
  const __m512i from = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(kAllFloats, from, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(from, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(sum, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_maskz_cvtepi32_epi16(kAllFloats, _mm512_maskz_srli_epi32(kAllFloats, result, 16));
#endif
}

// `streamed` writes go past the caches; they take whole, aligned lines, piece by piece.
static inline void put(float* to, Floats values, bool streamed) {
  streamed ? _mm512_stream_ps(to, values) : _mm512_storeu_ps(to, values);
}
static inline void put_bits(void* to, __m256i bits, bool streamed) {
  auto* target = reinterpret_cast<__m256i*>(to);
  streamed ? _mm256_stream_si256(target, bits) : _mm256_storeu_si256(target, bits);
}
static inline void put_bits(void* to, __m512i bits, bool streamed) {
  streamed ? _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits) : _mm512_storeu_si512(to, bits);
}
template <class T> static inline void put(T* to, Floats values, bool streamed) {
  put_bits(to, rounded(to, values), streamed);
}

template <class T> static inline __m512i rounded(const T* to, Floats first, Floats second) {
  return _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(rounded(to, first)), rounded(to, second), 1);
}
#if defined(__AVX512BF16__)
static inline __m512i rounded(const BFloat16*, Floats first, Floats second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}
#endif

static inline Floats fraction(Floats t) {  // 0 of an infinity
  return _mm512_maskz_reduce_ps(kAllFloats, t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
static inline Floats times_power_of_whole(Floats a, Floats t) { return _mm512_maskz_scalef_ps(kAllFloats, a, t); }

// 14 bits of a reciprocal are enough for 8.
template <class T> static inline Floats quotient(Floats a, Floats b) {
  if (std::is_same<T, BFloat16>::value) return a * _mm512_maskz_rcp14_ps(kAllFloats, b);
  return a / b;
}

#else

using Floats = __m256;

static inline Floats spread(float value) { return _mm256_set1_ps(value); }

static inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
static inline Floats load(const BFloat16* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline Floats load(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// To the nearest, ties to even.
static inline __m128i rounded(const Half*, Floats values) { return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT); }
static inline __m256i rounded_bits(Floats values) {
  const __m256i from = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(from, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(from, _mm256_set1_epi32(0x7fff)), odd);
  const Floats nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
  const Floats quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  return _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(sum), quiet, nan)), 16);
}
static inline __m128i rounded(const BFloat16*, Floats values) {
  const __m256i bits = rounded_bits(values);
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
static inline __m256i rounded(const Half* to, Floats first, Floats second) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(rounded(to, first)), rounded(to, second), 1);
}
static inline __m256i rounded(const BFloat16*, Floats first, Floats second) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded_bits(first), rounded_bits(second)), 0xd8);
}

static inline void put(float* to, Floats values, bool streamed) {
  streamed ? _mm256_stream_ps(to, values) : _mm256_storeu_ps(to, values);
}
static inline void put_bits(void* to, __m256i bits, bool streamed) {
  auto* target = reinterpret_cast<__m256i*>(to);
  streamed ? _mm256_stream_si256(target, bits) : _mm256_storeu_si256(target, bits);
}
template <class T> static inline void put(T* to, Floats values, bool streamed) {
  auto* target = reinterpret_cast<__m128i*>(to);
  streamed ? _mm_stream_si128(target, rounded(to, values)) : _mm_storeu_si128(target, rounded(to, values));
}

// Where 2^t is a normal number and nothing overflows; the second operand is the result where it is a NaN.
static inline Floats in_range(Floats t) { return _mm256_min_ps(spread(126.0f), _mm256_max_ps(spread(-126.0f), t)); }
static inline Floats floor_of(Floats t) { return _mm256_round_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
static inline Floats fraction(Floats t) { return in_range(t) - floor_of(in_range(t)); }
static inline Floats times_power_of_whole(Floats a, Floats t) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(floor_of(in_range(t))), _mm256_set1_epi32(127));
  return a * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

// 12 bits of a reciprocal, and with a step of Newton's 22.
template <class T> static inline Floats quotient(Floats a, Floats b) {
  if (sizeof(T) > 2) return a / b;
  const Floats r = _mm256_rcp_ps(b);
  return a * (r + r * (spread(1.0f) - b * r));
}

#endif

constexpr int64_t kFloats = sizeof(Floats) / sizeof(float);

// Registers side by side. Two of 16-bit results are written at once: half a line is slow to be streamed.
template <int kCount> static inline void put(float* to, const Floats (&values)[kCount], bool streamed) {
#pragma GCC unroll 8
  for (int n = 0; n < kCount; ++n) put(to + n * kFloats, values[n], streamed);
}
template <class T, int kCount> static inline void put(T* to, const Floats (&values)[kCount], bool streamed) {
#pragma GCC unroll 8
  for (int n = 0; n + 2 <= kCount; n += 2) {
    const auto bits = rounded(to, values[n], values[n + 1]);
    put_bits(to + n * kFloats, bits, streamed);
  }
  if (kCount % 2) put(to + (kCount - 1) * kFloats, values[kCount - 1], streamed);
}

}  // namespace cogvx
#endif
