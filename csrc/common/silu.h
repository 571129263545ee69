// SiLU, v / (1 + e^-v), and its derivative, in arithmetic that turns into vector code on any target.
//
// Functions here are `static`: every instruction set gets its own copy, and none can be linked into another's code.
#pragma once

#include <math.h>

#include <cstdint>

#include "common/dtype.h"

namespace cogvx {

// e^r for |r| <= ln(2) / 2: within 3e-6 of itself for results of 16 bits, 8e-8 for those of float.
template <class T> static inline float exponential_of_remainder(float r) {
  if (sizeof(T) == 2)
    return 1.0f + r * (0x1.fffba6p-1f + r * (0x1.0003f6p-1f + r * (0x1.57cf54p-3f + r * 0x1.541480p-5f)));
  const float high = 0x1.555824p-5f + r * (0x1.1267d8p-7f + r * 0x1.6ae6e0p-10f);
  return 1.0f + r * (1.0f + r * (0x1.fffffcp-2f + r * (0x1.555418p-3f + r * high)));
}

// e^x for results of type T: 2^n e^r with an integer n. Infinite from 88.4 on; never below 2^-126.
template <class T> static inline float exponential(float x) {
  const float above = x < -87.3f ? -87.3f : x, clamped = above > 89.0f ? 89.0f : above;  // a NaN stays one
  const float shifted = clamped * 0x1.715476p+0f + 0x1.8p23f;  // n in the lowest bits: floats are whole numbers here
  const float n = shifted - 0x1.8p23f;
  const float r = (clamped - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // ln(2) in two parts, the first exact times n
  const float power = from_bits((as_bits(shifted) + 127u) << 23);
  return power * exponential_of_remainder<T>(r);
}

template <class T> static inline float sigmoid(float v) { return 1.0f / (1.0f + exponential<T>(-v)); }
template <class T> static inline double sigmoid(double v) { return 1.0 / (1.0 + exp(-v)); }

template <class T, class A> static inline A silu(A v) { return v * sigmoid<T>(v); }

template <class T, class A> static inline A silu_derivative(A v) {
  const A s = sigmoid<T>(v);
  return s * (1 + v * (1 - s));
}

}  // namespace cogvx
