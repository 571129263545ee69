// A row of a tensor: taken into the arithmetic type, rounded back, and written past the caches; its mean and variance.
//
// For cpu.cpp files: everything is `static` or unnamed, so every instruction set gets its own copy.
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
      : stride((width + kLine - 1) / kLine * kLine), memory(new A[(count * stride) + kLine]), data(memory) {
    while (reinterpret_cast<uintptr_t>(data) % 64) ++data;
  }
  ~Scratch() { delete[] memory; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* row(int64_t i) const { return data + i * stride; }
};

// Memory that will be read soon; any address will do.
inline void prefetch(const void* memory) {
#if defined(__GNUC__)
  __builtin_prefetch(memory);
#else
  (void)memory;
#endif
}

template <class T> void prefetch_row(const T* row, int64_t width) {
  for (int64_t i = 0; i < width; i += 64 / static_cast<int64_t>(sizeof(T))) prefetch(row + i);
}

template <class T> void load_row(accumulator_t<T>* to, const T* from, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) to[i] = widen(from[i]);
}

// Rounds to the nearest, ties to even.
template <class T> void round_row(T* to, const accumulator_t<T>* from, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) store(to + i, from[i]);
}

#if defined(__AVX512BF16__)
// The instruction takes subnormal numbers for zeros, which is below any error that bfloat16 could show.
inline void round_row(BFloat16* to, const float* from, int64_t width) {
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 inside = width - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (width - i)) - 1);
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, from + i));
    _mm256_mask_storeu_epi16(to + i, inside, (__m256i)rounded);
  }
}
#endif

// Results above this size leave the caches before anyone reads them, so they are written past these.
constexpr int64_t kStreamedBytes = int64_t{8} << 20;

// A copy that does not first read what it overwrites, nor pushes anything out of the caches.
inline void stream_bytes(char* to, const char* from, size_t size) {
#if defined(__SSE2__)
  const size_t head = (64 - reinterpret_cast<uintptr_t>(to) % 64) % 64;
  size_t i = head < size ? head : size;
  std::memcpy(to, from, i);
  for (; i + 64 <= size; i += 64) {
    for (int part = 0; part < 64; part += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + part),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + part)));
  }
  std::memcpy(to + i, from + i, size - i);
#else
  std::memcpy(to, from, size);
#endif
}

// After the last streamed row of a thread, so that others see them.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T> void copy_row(T* to, const T* from, int64_t width, bool streamed) {
  const auto size = static_cast<size_t>(width) * sizeof(T);
  if (streamed) return stream_bytes(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(from), size);
  std::memcpy(to, from, size);
}

// Rounds a row on its way; `rounded` has room for it.
template <class T>
void write_row(T* to, const accumulator_t<T>* from, int64_t width, bool streamed, accumulator_t<T>* rounded) {
  if (!streamed) return round_row(to, from, width);
  round_row(reinterpret_cast<T*>(rounded), from, width);
  copy_row(to, reinterpret_cast<const T*>(rounded), width, true);
}

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
