// A vector register of floats or doubles, and what attention does with one: exp2, maximum, sum.
//
// Included by cpu.cpp alone, once for each instruction set. GCC's and Clang's vector types work on any processor; for
// another compiler a register is one number.
#pragma once

#ifdef __AVX512F__
#ifdef __GNUC__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of the intrinsics' own undefined values
#endif
#include <immintrin.h>
#ifdef __GNUC__
#pragma GCC diagnostic pop
#endif
#endif
#include <math.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "common/dtype.h"

namespace cogvx::joint_attention::COGVX_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLaneBytes = 64, kPanelVectors = 4;  // vectors beside one another in a micro-kernel
#elif defined(__AVX2__)
constexpr int kLaneBytes = 32, kPanelVectors = 2;
#else
constexpr int kLaneBytes = 16, kPanelVectors = 2;
#endif

#ifdef __GNUC__
template <class A> struct Lanes {
  typedef A type __attribute__((vector_size(kLaneBytes)));
  typedef A in_memory __attribute__((vector_size(kLaneBytes), aligned(sizeof(A)), may_alias));
  static constexpr int count = kLaneBytes / static_cast<int>(sizeof(A));
};
template <class A> inline A lane(typename Lanes<A>::type vector, int i) { return vector[i]; }
template <class A> inline void set_lane(typename Lanes<A>::type& vector, int i, A value) { vector[i] = value; }
#else
template <class A> struct Lanes {
  using type = A;
  using in_memory = A;
  static constexpr int count = 1;
};
template <class A> inline A lane(A vector, int) { return vector; }
template <class A> inline void set_lane(A& vector, int, A value) { vector = value; }
#endif

template <class A> using Vec = typename Lanes<A>::type;

template <class A> inline Vec<A> load(const A* from) {
  return *reinterpret_cast<const typename Lanes<A>::in_memory*>(from);
}

template <class A> inline void put(A* target, Vec<A> vector) {
  *reinterpret_cast<typename Lanes<A>::in_memory*>(target) = vector;
}

template <class A> inline Vec<A> spread(A value) { return value - Vec<A>{}; }  // minus zero changes nothing, -0 neither

template <class A> inline double sum_of(Vec<A> vector) {
  double sum = 0;
  for (int i = 0; i < Lanes<A>::count; ++i) sum += lane<A>(vector, i);
  return sum;
}

// The largest lane; NaN if there is one.
template <class A> inline A top_of(Vec<A> vector) {
  A top = lane<A>(vector, 0);
  for (int i = 1; i < Lanes<A>::count; ++i) {
    const A value = lane<A>(vector, i);
    top = value > top || value != value ? value : top;
  }
  return top;
}

// Of a NaN and a number the second argument.
template <class A> inline Vec<A> larger(Vec<A> a, Vec<A> b) { return a > b ? a : b; }

// Whether some lane is above the limit or NaN.
template <class A> inline bool any_above(Vec<A> vector, A limit) {
  bool any = false;
  for (int i = 0; i < Lanes<A>::count; ++i) any |= !(lane<A>(vector, i) <= limit);
  return any;
}
#ifdef __AVX512F__
template <> inline bool any_above<float>(Vec<float> vector, float limit) {
  return _mm512_cmp_ps_mask(vector, _mm512_set1_ps(limit), _CMP_NLE_UQ) != 0;
}
#endif

// 2^x for 0 <= x < 1, and 1 for 0: polynomials of the least relative error, 8.6e-5 (half an ulp of bfloat16 is 2e-3)
// and 1.9e-9.
template <bool kCoarse> inline Vec<float> exp2_of_fraction(Vec<float> x) {
  if (kCoarse) return ((0.07706705f * x + 0.22764498f) * x + 0.69511679f) * x + 1.0f;
  const Vec<float> high = ((2.1702254889e-4f * x + 1.2439687271e-3f) * x + 9.6788406372e-3f) * x + 5.5483341217e-2f;
  return ((high * x + 2.4022983015e-1f) * x + 6.9314700365e-1f) * x + 1.0f;
}

// 2^x; 0 below the smallest normal number, NaN for NaN. x is at most 127.
template <bool kCoarse> inline Vec<float> exp2_of(Vec<float> x) {
#ifdef __AVX512F__
  const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // 0 of an infinity
  return _mm512_scalef_ps(exp2_of_fraction<kCoarse>(fraction), x);
#elif defined(__GNUC__)
  using Bits = int32_t __attribute__((vector_size(kLaneBytes)));
  const Vec<float> lowest = spread(-126.0f);
  const Vec<float> clamped = x < lowest ? lowest : x;
  const Vec<float> shifted = clamped - 0.5f + 12582912.0f;  // 1.5 * 2^23: the integer part ends up in the low bits
  const Vec<float> whole = shifted - 12582912.0f;
  const Vec<float> power = reinterpret_cast<Vec<float>>((reinterpret_cast<Bits>(shifted) + 127) << 23);
  const Vec<float> result = exp2_of_fraction<kCoarse>(clamped - whole) * power;
  return x < lowest ? Vec<float>{} : result;
#else
  return exp2f(x);
#endif
}

template <bool kCoarse> inline Vec<double> exp2_of(Vec<double> x) {
  Vec<double> result;
  for (int i = 0; i < Lanes<double>::count; ++i) set_lane<double>(result, i, exp2(lane<double>(x, i)));
  return result;
}

}  // namespace
}  // namespace cogvx::joint_attention::COGVX_ISA
