// The rows of one head of 64 values, four AVX-512 registers: two or four cache lines are read, and written past the
// caches. Included by cpu.cpp alone, once for each instruction set.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 sees one inside its own intrinsics
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include "qk_norm_rope/rows.h"

namespace cogvx::qk_norm_rope::COGVX_ISA {
namespace {

struct Row64 {
  __m512 v[4];
};

inline Row64 load64(const float* from) {
  return {{_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16), _mm512_loadu_ps(from + 32), _mm512_loadu_ps(from + 48)}};
}

inline Row64 load64(const BFloat16* from) {
  Row64 row;
  for (int i = 0; i < 4; ++i) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 16 * i)));
    row.v[i] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  return row;
}

inline Row64 load64(const Half* from) {
  Row64 row;
  for (int i = 0; i < 4; ++i)
    row.v[i] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 16 * i)));
  return row;
}

// Two registers as 32 values of 16 bits, rounded to the nearest, ties to even.
inline __m512i narrow(__m512 low, __m512 high, Half) {
  const __m256i first = _mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i second = _mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

#if defined(__AVX512BF16__)
inline __m512i narrow(__m512 low, __m512 high, BFloat16) {
  const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
  __m512i bits;
  std::memcpy(&bits, &both, sizeof bits);
  return bits;
}
#else
inline __m256i bfloat16_bits(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x00400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

inline __m512i narrow(__m512 low, __m512 high, BFloat16) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(bfloat16_bits(low)), bfloat16_bits(high), 1);
}
#endif

// kStream: the target, aligned to 64 bytes, goes to memory without being read into the caches first.
template <bool kStream> inline void put(void* target, __m512i bits) {
  if (kStream)
    _mm512_stream_si512(static_cast<__m512i*>(target), bits);
  else
    _mm512_storeu_si512(target, bits);
}

template <bool kStream> inline void store64(float* to, const Row64& row) {
  for (int i = 0; i < 4; ++i) put<kStream>(to + 16 * i, _mm512_castps_si512(row.v[i]));
}

template <bool kStream, class T> inline void store64(T* to, const Row64& row) {
  for (int i = 0; i < 2; ++i) put<kStream>(to + 32 * i, narrow(row.v[2 * i], row.v[2 * i + 1], T{}));
}

template <bool kStream, class T> inline void copy64(T* to, const T* from) {
  constexpr int kPerRegister = 64 / sizeof(T);
  for (int i = 0; i < 64; i += kPerRegister) put<kStream>(to + i, _mm512_loadu_si512(from + i));
}

inline __m512 swap_pairs(__m512 x) { return _mm512_permute_ps(x, 0xb1); }

inline __m512 sum64(const Row64& row) {  // over the four registers
  return _mm512_add_ps(_mm512_add_ps(row.v[0], row.v[1]), _mm512_add_ps(row.v[2], row.v[3]));
}

inline __m512 sum_of_product64(const Row64& a, const Row64& b) {
  const __m512 first = _mm512_fmadd_ps(a.v[1], b.v[1], _mm512_mul_ps(a.v[0], b.v[0]));
  const __m512 second = _mm512_fmadd_ps(a.v[3], b.v[3], _mm512_mul_ps(a.v[2], b.v[2]));
  return _mm512_add_ps(first, second);
}

inline __m512 mean64(__m512 sums) { return _mm512_set1_ps(_mm512_reduce_add_ps(sums) / 64.0f); }

// Four means at once, of 64 values each whose sums over registers are given: (m0, m1, m2, m3), four times over. One
// row's sums and root depend on one another for longer than a processor looks ahead; four rows hide that.
inline __m512 means64(__m512 s0, __m512 s1, __m512 s2, __m512 s3) {
  const __m512 s01 = _mm512_add_ps(_mm512_unpacklo_ps(s0, s1), _mm512_unpackhi_ps(s0, s1));
  const __m512 s23 = _mm512_add_ps(_mm512_unpacklo_ps(s2, s3), _mm512_unpackhi_ps(s2, s3));
  const __m512 low = _mm512_shuffle_ps(s01, s23, 0x44), high = _mm512_shuffle_ps(s01, s23, 0xee);
  __m512 sums = _mm512_add_ps(low, high);  // each of the four lanes holds its part of (s0, s1, s2, s3)
  sums = _mm512_add_ps(sums, _mm512_shuffle_f32x4(sums, sums, 0x4e));
  sums = _mm512_add_ps(sums, _mm512_shuffle_f32x4(sums, sums, 0xb1));
  return _mm512_mul_ps(sums, _mm512_set1_ps(1.0f / 64.0f));
}

struct Four {
  __m512 v[4];  // each a value in all places
};

inline Four spread(__m512 m) {
  return {{_mm512_permute_ps(m, 0x00), _mm512_permute_ps(m, 0x55), _mm512_permute_ps(m, 0xaa),
           _mm512_permute_ps(m, 0xff)}};
}

inline void start_from_first(Row64& row) {
  const __m512 start = _mm512_broadcastss_ps(_mm512_castps512_ps128(row.v[0]));
  for (int i = 0; i < 4; ++i) row.v[i] = _mm512_sub_ps(row.v[i], start);
}

// Each row = (row - mean) / sqrt(variance + eps), as `normalize` in rows.h; returns the factors.
inline Four normalize64(Row64 (&rows)[4], float eps) {
  for (int r = 0; r < 4; ++r) start_from_first(rows[r]);
  const Four mean = spread(means64(sum64(rows[0]), sum64(rows[1]), sum64(rows[2]), sum64(rows[3])));
  for (int r = 0; r < 4; ++r)
    for (int i = 0; i < 4; ++i) rows[r].v[i] = _mm512_sub_ps(rows[r].v[i], mean.v[r]);
  const __m512 variance = means64(sum_of_product64(rows[0], rows[0]), sum_of_product64(rows[1], rows[1]),
                                  sum_of_product64(rows[2], rows[2]), sum_of_product64(rows[3], rows[3]));
  const __m512 root = _mm512_sqrt_ps(_mm512_add_ps(variance, _mm512_set1_ps(eps)));
  const Four rstd = spread(_mm512_div_ps(_mm512_set1_ps(1.0f), root));
  for (int r = 0; r < 4; ++r)
    for (int i = 0; i < 4; ++i) rows[r].v[i] = _mm512_mul_ps(rows[r].v[i], rstd.v[r]);
  return rstd;
}

// The same for one row; returns its factor.
inline float normalize64(Row64& row, float eps) {
  start_from_first(row);
  const __m512 mean = mean64(sum64(row));
  for (int i = 0; i < 4; ++i) row.v[i] = _mm512_sub_ps(row.v[i], mean);
  const float rstd = 1.0f / sqrtf(_mm512_reduce_add_ps(sum_of_product64(row, row)) / 64.0f + eps);
  for (int i = 0; i < 4; ++i) row.v[i] = _mm512_mul_ps(row.v[i], _mm512_set1_ps(rstd));
  return rstd;
}

// Values with the digits that a type has.
inline __m512 as_held64(__m512 x, float) { return x; }

inline __m512 as_held64(__m512 x, Half) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline __m512 as_held64(__m512 x, BFloat16) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
  return _mm512_castsi512_ps(_mm512_mask_and_epi32(bits, is_number, rounded, _mm512_set1_epi32(~0xffff)));
}

// (x[2i] cos - x[2i+1] sin, x[2i+1] cos + x[2i] sin); kRounded as Args says.
template <bool kRounded, class T> inline void turn64(Row64& row, const float* cos, const float* sin) {
  for (int i = 0; i < 4; ++i) {
    const __m512 by_cos = _mm512_loadu_ps(cos + 16 * i), by_sin = _mm512_loadu_ps(sin + 16 * i);
    if (kRounded) {
      const __m512 x = as_held64(row.v[i], T{});
      const __m512 across = as_held64(_mm512_mul_ps(swap_pairs(x), by_sin), T{});
      row.v[i] = _mm512_fmaddsub_ps(as_held64(_mm512_mul_ps(x, by_cos), T{}), _mm512_set1_ps(1.0f), across);
    } else {
      row.v[i] = _mm512_fmaddsub_ps(row.v[i], by_cos, _mm512_mul_ps(swap_pairs(row.v[i]), by_sin));
    }
  }
}

// The transpose of turn64, for gradients.
inline void turn_back64(Row64& row, const float* cos, const float* sin) {
  for (int i = 0; i < 4; ++i) {
    const __m512 across = swap_pairs(_mm512_mul_ps(row.v[i], _mm512_loadu_ps(sin + 16 * i)));
    row.v[i] = _mm512_fmsubadd_ps(row.v[i], _mm512_loadu_ps(cos + 16 * i), across);
  }
}

inline void add64(double* to, const Row64& row) {
  for (int i = 0; i < 8; ++i) {
    const __m256 half = i % 2 ? _mm512_extractf32x8_ps(row.v[i / 2], 1) : _mm512_castps512_ps256(row.v[i / 2]);
    _mm512_storeu_pd(to + 8 * i, _mm512_add_pd(_mm512_loadu_pd(to + 8 * i), _mm512_cvtps_pd(half)));
  }
}

template <bool kStream, bool kTurn, bool kRounded, class T>
void forward_rows64(const Span<T>& at, int64_t first, int64_t last, T* y) {
  const Row64 weight = load64(at.weight), bias = load64(at.bias);
  for (int64_t n = first; n < last; n += 4) {
    Row64 rows[4];
    int64_t each[4];
    for (int r = 0; r < 4; ++r) {
      each[r] = n + r < last ? n + r : last - 1;  // beyond the last row, the last row again
      const T* x = at.x + each[r] * at.stride;
      fetch_ahead(x, 64);
      rows[r] = load64(x);
    }
    normalize64(rows, at.eps);
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < 4; ++i) rows[r].v[i] = _mm512_fmadd_ps(rows[r].v[i], weight.v[i], bias.v[i]);
      if (kTurn) turn64<kRounded, T>(rows[r], at.cos + at.angle(each[r]), at.sin + at.angle(each[r]));
      store64<kStream>(y + (each[r] - at.first) * 64, rows[r]);
    }
  }
}

template <bool kStream, class T> void forward_rows64(const Span<T>& at, T* y) {
  const int64_t turning = !at.cos || at.num_text > at.last ? at.last : at.num_text < at.first ? at.first : at.num_text;
  forward_rows64<kStream, false, false>(at, at.first, turning, y);
  if (at.rounded)
    forward_rows64<kStream, true, true>(at, turning, at.last, y);
  else
    forward_rows64<kStream, true, false>(at, turning, at.last, y);
}

template <bool kStream, class T> void copy_rows64(const Span<T>& at, T* y) {
  for (int64_t n = at.first; n < at.last; ++n, y += 64) {
    fetch_ahead(at.x + n * at.stride, 64);
    copy64<kStream>(y, at.x + n * at.stride);
  }
}

// Without the gradients of cos and sin.
template <class T> void backward_rows64(const Span<T>& at, const Gradients<T>& grads) {
  const Row64 weight = load64(at.weight);
  Row64 sum_g_xhat{}, sum_g{};
  for (int64_t n = at.first; n < at.last; ++n) {
    const T *x = at.x + n * at.stride, *grad_y = grads.y + n * grads.stride_y;
    fetch_ahead(x, 64);
    Row64 xhat = load64(x), g = load64(grad_y);
    const float rstd = normalize64(xhat, at.eps);
    if (at.turns(n)) turn_back64(g, at.cos + at.angle(n), at.sin + at.angle(n));
    for (int i = 0; i < 4; ++i) {
      sum_g_xhat.v[i] = _mm512_fmadd_ps(g.v[i], xhat.v[i], sum_g_xhat.v[i]);
      sum_g.v[i] = _mm512_add_ps(sum_g.v[i], g.v[i]);
      g.v[i] = _mm512_mul_ps(g.v[i], weight.v[i]);  // d from here on
    }
    const __m512 mean_d = mean64(sum64(g)), mean_d_xhat = mean64(sum_of_product64(g, xhat));
    for (int i = 0; i < 4; ++i) {
      const __m512 rest = _mm512_fnmadd_ps(xhat.v[i], mean_d_xhat, _mm512_sub_ps(g.v[i], mean_d));
      g.v[i] = _mm512_mul_ps(rest, _mm512_set1_ps(rstd));
    }
    store64<false>(grads.x + n * grads.stride_x, g);
  }
  add64(grads.weight, sum_g_xhat);
  add64(grads.bias, sum_g);
}

}  // namespace
}  // namespace cogvx::qk_norm_rope::COGVX_ISA
