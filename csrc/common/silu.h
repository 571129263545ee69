// SiLU, v / (1 + e^-v), and its derivative, in arithmetic that turns into vector code on any target.
//
// Functions here are `static`: every instruction set gets its own copy, and none can be linked into another's code.
#pragma once

#include <math.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/floats.h"

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

// 2^t for results of type T: 2^n 2^f with an integer n. Infinite from 128 on; never below 2^-126.
template <class T> static inline float power(float t) {
  const float above = t < -126.0f ? -126.0f : t, clamped = above > 128.0f ? 128.0f : above;  // a NaN stays one
  const float shifted = clamped + 0x1.8p23f;  // n in the lowest bits: floats are whole numbers here
  return from_bits((as_bits(shifted) + 127u) << 23) * power_of_fraction<T>(clamped - (shifted - 0x1.8p23f));
}

template <class T> static inline double power(double t) { return exp2(t); }

// e^x, the same way. Infinite from 88.4 on.
template <class T> static inline float exponential(float x) {
  const float above = x < -87.3f ? -87.3f : x, clamped = above > 89.0f ? 89.0f : above;  // a NaN stays one
  const float shifted = clamped * kLog2E + 0x1.8p23f;  // n in the lowest bits: floats are whole numbers here
  float f = clamped * kLog2E - (shifted - 0x1.8p23f);
  if (sizeof(T) == 4) f += clamped * kLog2ERest;
  return from_bits((as_bits(shifted) + 127u) << 23) * power_of_fraction<T>(f);
}

template <class T> static inline double exponential(double x) { return exp(x); }

// silu(v) from t = kSiluUnit * v, so that e^-v is 2^t: what computes v takes the factor into its coefficients.
constexpr double kSiluUnit = -0x1.71547652b82fep+0;  // -log2(e)

template <class T, class A> static inline A silu(A t) {
  constexpr A kUnit = static_cast<A>(kSiluUnit);
  return t / (kUnit + kUnit * power<T>(t));
}

template <class T, class A> static inline A silu_derivative(A v) {
  const A e = exponential<T>(v < -88 ? A{88} : -v), s = 1 / (1 + e);  // e is finite, so that e * s is 1 - s
  return s * (1 + v * (e * s));
}

#if defined(__AVX2__)
// Some registers at a time, step by step: one alone would wait for itself all the time.
template <class T, int kCount> static inline void silu_together(Floats (&t)[kCount]) {
  using Power = PowerOfFraction<T>;
  constexpr float kUnit = static_cast<float>(kSiluUnit);
  Floats f[kCount], power[kCount];
#pragma GCC unroll 8
  for (int n = 0; n < kCount; ++n) f[n] = fraction(t[n]);
#pragma GCC unroll 8
  for (int n = 0; n < kCount; ++n) power[n] = spread(kUnit * Power::of[Power::degree]);
#pragma GCC unroll 8
  for (int i = Power::degree - 1; i >= 0; --i) {
#pragma GCC unroll 8
    for (int n = 0; n < kCount; ++n) power[n] = power[n] * f[n] + spread(kUnit * Power::of[i]);
  }
#pragma GCC unroll 8
  for (int n = 0; n < kCount; ++n) power[n] = spread(kUnit) + times_power_of_whole(power[n], t[n]);
#pragma GCC unroll 8
  for (int n = 0; n < kCount; ++n) t[n] = quotient<T>(t[n], power[n]);
}
#endif

}  // namespace cogvx
