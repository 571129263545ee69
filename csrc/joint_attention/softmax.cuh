// The softmax of a warp's scores while they go by.
#pragma once

#include "common/ptx.cuh"
#include "joint_attention/tile.cuh"

namespace cogvx::joint_attention {

constexpr float kBits = 1.44269504f;  // turns an exponent to e into one to 2
constexpr float kInfinity = __builtin_huge_valf();

// Every so many exponentials are computed by the units that multiply and add: those for exponentials are the scarcest.
constexpr int kEmulatedEvery = 8;

// 2^f for |f| <= 1/2: to 1.0e-4, a twentieth of what rounding a weight to bfloat16 costs, and to 2.8e-6 for float16.
__device__ inline float exp2_of_fraction(float f, __nv_bfloat16) {
  return ((0.055008933f * f + 0.24221095f) * f + 0.69328290f) * f + 1.0f;
}
__device__ inline float exp2_of_fraction(float f, __half) {
  return (((0.0095828529f * f + 0.055906426f) * f + 0.24024099f) * f + 0.69312418f) * f + 1.0f;
}

// 2^x for x up to 127, and 0 below -127; a NaN is lost.
template <class T> __device__ float exp2_emulated(float x) {
  constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: a float of this size has its whole part in the low bits
  x = fmaxf(x, -127.0f);
  const float shifted = x + kRounding, power = exp2_of_fraction(x - (shifted - kRounding), T{});
  return __uint_as_float(__float_as_uint(power) + (__float_as_uint(shifted) << 23));
}

// The largest of a row's scores, of which 4 lanes hold a part.
__device__ inline float largest_of_row(float x) {
  x = max_or_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return max_or_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ inline float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// What is subtracted from scores under a peak: before any score is above minus infinity, no weight is above 0.
__device__ inline float finite(float peak) { return peak == -kInfinity ? 0.0f : peak; }

// Gives columns from `end` on no weight; a tile's first column is `first`.
template <int kBlocks, int kColumns> __device__ void mask(Sums<kBlocks, kColumns>& scores, int first, int end) {
  if (first + kColumns <= end) return;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (first + 8 * j + static_cast<int>(threadIdx.x) % 4 * 2 + e % 2 >= end)
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) scores[i][j][e] = -kInfinity;
}

// A weight is 2^(score * bits - peak * bits). A peak is a score that was the largest, and stays while later ones are
// not much larger: what was added up under it need not be scaled. A NaN among the scores becomes the peak. Exact, no
// exponential is emulated for the precision of T.
template <class T, int kBlocks, bool kIsExact = false> struct Softmax {
  static constexpr float kSlack = 8.0f;       // bits; a weight of 2^8 is far from the limit of float16
  static constexpr float kLarge = 4194304.0f;  // 2^22
  float peaks[kBlocks][2], totals[kBlocks][2];  // of rows g and g + 8; of a total, this lane's part

  __device__ Softmax() {
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      peaks[i / 2][i % 2] = -kInfinity;
      totals[i / 2][i % 2] = 0.0f;
    }
  }

  // Turns scores into weights, and scales the sums of earlier ones where the peak moves.
  template <int kColumns, int kWidth>
  __device__ void weigh(Sums<kBlocks, kColumns>& scores, Sums<kBlocks, kWidth>& sums, float bits) {
    bool moves = false;
    float decays[kBlocks][2];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = scores[i][0][2 * half];
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j)
          largest = max_or_nan(largest, max_or_nan(scores[i][j][2 * half], scores[i][j][2 * half + 1]));
        largest = largest_of_row(largest);
        float& peak = peaks[i][half];
        const bool stays = largest * bits <= peak * bits + kSlack;
        decays[i][half] = stays ? 1.0f : exp2_approximate((peak - finite(largest)) * bits);
        peak = stays ? peak : largest;
        moves |= !stays;
      }
    if (__any_sync(0xffffffffu, moves)) scale(sums, decays);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) weigh_row(scores[i], half, bits, finite(peaks[i][half]), totals[i][half]);
  }

  __device__ void inverse_totals(float (&inverses)[kBlocks][2]) const {
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) inverses[i / 2][i % 2] = 1.0f / sum_of_row(totals[i / 2][i % 2]);
  }

  // For each row log(sum of e^(score * scale)); `to` is for the warp's first row, `count` how many rows it has. What
  // rounding added to the exponents of a row is taken from the logarithm of their sum.
  __device__ void store_logarithms(float* to, int count, float bits, float scale) const {
    constexpr float kLog2 = 0.693147181f;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = sum_of_row(totals[i][half]), peak = finite(peaks[i][half]), own_bits = bits_for(peak, bits);
        const float added = __fmaf_rn(peak, own_bits, -__fmul_rn(peak, own_bits));
        const int row = 16 * i + 8 * half + threadIdx.x % 32 / 4;
        if (threadIdx.x % 4 == 0 && row < count) to[row] = peak * scale + (logf(total) - added * kLog2);
      }
  }

 private:
  static __device__ float bits_for(float peak, float bits) {
    return fabsf(peak) < kLarge ? bits : __uint_as_float(__float_as_uint(bits) & 0xff800000u);
  }

  // One instruction takes a score to its exponent. What rounding the peak's product adds to all exponents alike divides
  // out, as long as it is small: a peak so large that floats near it lie further apart than its neighbours' exponents
  // could tell gets a power of two, whose products are exact.
  template <int kVectors>
  static __device__ void weigh_row(float (&scores)[kVectors][4], int half, float bits, float peak, float& total) {
    const float own_bits = bits_for(peak, bits);
    const float peak_bits = peak * own_bits;
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& score = scores[j][2 * half + c];
        const float x = __fmaf_rn(score, own_bits, -peak_bits);
        const bool is_emulated = !kIsExact && (j + 2 * half + c) % kEmulatedEvery == 0;
        score = is_emulated ? exp2_emulated<T>(x) : exp2_approximate(x);
        total += score;
      }
  }

  template <int kVectors> __device__ void scale(float (&sums)[kBlocks][kVectors][4], const float (&by)[kBlocks][2]) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) totals[i][half] *= by[i][half];
#pragma unroll
      for (int j = 0; j < kVectors; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] *= by[i][e / 2];
    }
  }
};

}  // namespace cogvx::joint_attention
