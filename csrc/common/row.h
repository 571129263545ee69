// A row of a tensor: taken into the arithmetic type, rounded back, and written past the caches; its mean and variance.
//
// For cpu.cpp files: everything is in an unnamed namespace, so every instruction set gets its own copy.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/dtype.h"
#include "common/place.h"

namespace cogvx {
namespace {

template <class T> const T* row_of(const Rows& rows, int64_t b, int64_t n) {
  return reinterpret_cast<const T*>(rows.data) + b * rows.stride_b + n * rows.stride_n;
}

template <class T> T* mutable_row_of(const Rows& rows, int64_t b, int64_t n) {
  return reinterpret_cast<T*>(rows.data) + b * rows.stride_b + n * rows.stride_n;
}

// Each thread's buffers: `count` rows in the arithmetic type, each on cache lines of its own.
template <class A> struct Scratch {
  static constexpr int64_t kLine = 64 / sizeof(A);
  int64_t stride;
  A *memory, *data;
  Scratch(int64_t count, int64_t width)
      : stride((width + kLine - 1) / kLine * kLine), memory(new A[count * stride + kLine]), data(memory) {
    while (reinterpret_cast<uintptr_t>(data) % 64) ++data;
  }
  ~Scratch() { delete[] memory; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* row(int64_t i) const { return data + i * stride; }
};

// Asks for a row that will be read soon; memory that is not there does no harm. The processor's own foresight ends with
// every page, which is about a row.
template <class T> void prefetch_row(const T* row, int64_t width) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < width; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i);
#else
  (void)row, (void)width;
#endif
}

template <class T, class A> void load_row(A* to, const T* from, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) to[i] = widen(from[i]);
}

// Rounds to the nearest, ties to even.
template <class T, class A> void round_row(T* to, const A* from, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) store(to + i, static_cast<accumulator_t<T>>(from[i]));
}

// Results above this size leave the caches before anyone reads them. Written past these, memory is not first read, and
// nothing else is pushed out; it takes rows of whole cache lines.
constexpr int64_t kStreamedBytes = int64_t{8} << 20;

template <class T> bool is_streamed(const Rows& rows, int64_t batch, int64_t num_rows, int64_t width) {
#if defined(__SSE2__)
  constexpr auto kLine = static_cast<int64_t>(64 / sizeof(T));
  const bool whole = width % kLine == 0 && rows.stride_b % kLine == 0 && rows.stride_n % kLine == 0;
  const int64_t bytes = batch * num_rows * width * static_cast<int64_t>(sizeof(T));
  return whole && reinterpret_cast<uintptr_t>(rows.data) % 64 == 0 && bytes > kStreamedBytes;
#else
  (void)rows, (void)batch, (void)num_rows, (void)width;
  return false;
#endif
}

// After the last streamed row of a thread, so that others see them.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T> void copy_row(T* to, const T* from, int64_t width, bool streamed) {
  const int64_t size = width * static_cast<int64_t>(sizeof(T));
#if defined(__SSE2__)
  for (int64_t i = 0; streamed && i < size; i += 16) {
    const auto* part = reinterpret_cast<const __m128i*>(reinterpret_cast<const char*>(from) + i);
    _mm_stream_si128(reinterpret_cast<__m128i*>(reinterpret_cast<char*>(to) + i), _mm_loadu_si128(part));
  }
#endif
  if (!streamed) std::memcpy(to, from, static_cast<size_t>(size));
}

// Rounds a row on its way to memory; `rounded` has room for it.
template <class T, class A> void write_row(T* to, const A* from, int64_t width, bool streamed, A* rounded) {
  if (!streamed) return round_row(to, from, width);
  round_row(reinterpret_cast<T*>(rounded), from, width);
  copy_row(to, reinterpret_cast<const T*>(rounded), width, true);
}

#if defined(__AVX512BF16__)
// Calls f(column, mask) for every 16 columns; the mask says which of them are inside the row.
template <class F> void each16(int64_t width, F f) {
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) f(i, __mmask16{0xffff});
  if (i < width) f(i, static_cast<__mmask16>((1u << (width - i)) - 1));
}

// Masked forms, whose mask takes all, because gcc warns of the others ("may be used uninitialized").
inline __m512 widen16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, bits), 16));
}

inline __m512 load16(const BFloat16* from, __mmask16 mask) { return widen16(_mm256_maskz_loadu_epi16(mask, from)); }

// The instruction takes subnormal numbers for zeros; where there is one, integers round instead.
inline __m256i round16(__m512 values) {
  constexpr int kSubnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(values, kSubnormal) == 0, 1))
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
  alignas(64) float wide[16];
  alignas(32) BFloat16 narrow[16];
  _mm512_store_ps(wide, values);
  for (int i = 0; i < 16; ++i) store(narrow + i, wide[i]);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(narrow));
}

inline void write16(BFloat16* to, __m256i bits, __mmask16 mask, bool streamed) {
  if (streamed) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits);
  _mm256_mask_storeu_epi16(to, mask, bits);
}

inline void round_row(BFloat16* to, const float* from, int64_t width) {
  each16(width, [=](int64_t i, __mmask16 mask) {
    write16(to + i, round16(_mm512_maskz_loadu_ps(mask, from + i)), mask, false);
  });
}

inline void write_row(BFloat16* to, const float* from, int64_t width, bool streamed, float*) {
  each16(width, [=](int64_t i, __mmask16 mask) {
    write16(to + i, round16(_mm512_maskz_loadu_ps(mask, from + i)), mask, streamed);
  });
}
#endif

inline float square_root(float value) { return sqrtf(value); }
inline double square_root(double value) { return sqrt(value); }

template <class A> struct Moments {
  A mean, rstd;
};

// The sum of f(value) over a row, in four chains, since one would wait for each addition.
template <class A, class F> A sum_of(const A* row, int64_t width, F f) {
  const int64_t quarter = width / 4;
  const A *second = row + quarter, *third = second + quarter, *fourth = third + quarter;
  A a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < quarter; ++i) {
    a += f(row[i]);
    b += f(second[i]);
    c += f(third[i]);
    d += f(fourth[i]);
  }
  for (int64_t i = 4 * quarter; i < width; ++i) a += f(row[i]);
  return (a + b) + (c + d);
}

// Two passes: the variance of the differences is accurate also where the mean is large.
template <class A> Moments<A> moments(const A* row, int64_t width, double eps) {
  const A mean = sum_of(row, width, [](A value) { return value; }) / static_cast<A>(width);
  const A squares = sum_of(row, width, [mean](A value) { return (value - mean) * (value - mean); });
  return {mean, 1 / square_root(squares / static_cast<A>(width) + static_cast<A>(eps))};
}

}  // namespace
}  // namespace cogvx
