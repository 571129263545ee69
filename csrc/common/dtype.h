// The element types of tensors, and the arithmetic type of each. Both 16-bit types are worked on in float.
//
// Functions here are `static`: every instruction set gets its own copy, and none can be linked into another's code.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace cogvx {

enum class DType { float32, float16, bfloat16, float64 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T> struct accumulator { using type = float; };
template <> struct accumulator<double> { using type = double; };
template <class T> using accumulator_t = typename accumulator<T>::type;

static inline DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float16") return DType::float16;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float64") return DType::float64;
  throw std::invalid_argument("dtype is " + name + "; float32, float16, bfloat16 and float64 are supported");
}

static inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float widen(float value) { return value; }
static inline double widen(double value) { return value; }
static inline float widen(BFloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

// Selects instead of branches, so that a loop over these becomes vector code on any target.
static inline float widen(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t subnormal = as_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t normal = (magnitude << 13) + (112u << 23);  // 112: the difference of the exponents' biases
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return from_bits(sign | (magnitude < 0x7c00u ? finite : special));
}

static inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x0040u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

static inline uint16_t half_bits(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Half's subnormals are multiples of 2^-24, which is the spacing of floats just above 0.5.
  const uint32_t subnormal = as_bits(from_bits(magnitude) + 0.5f) - as_bits(0.5f);
  const uint32_t normal = (magnitude + 0x0fffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;  // 2^-14
  return static_cast<uint16_t>(sign | (magnitude < 0x477ff000u ? finite : special));  // 65520
}

// Rounds to the nearest, ties to even.
static inline void store(float* target, float value) { *target = value; }
static inline void store(double* target, double value) { *target = value; }
static inline void store(BFloat16* target, float value) { target->bits = bfloat16_bits(value); }
static inline void store(Half* target, float value) { target->bits = half_bits(value); }

}  // namespace cogvx
