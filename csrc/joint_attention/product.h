// Matrix products of small tiles: c = a b or c += a b, b packed in panels as wide as a micro-kernel.
//
// A product steps over its inner dimension; a step is one number, or, where the processor multiplies pairs of bfloat16,
// two neighbours in one 32-bit word. `a` is read a word at a time, at any two strides; a panel of `b` holds
// [steps][columns], so that a micro-kernel reads it from one end to the other.
#pragma once

#include "joint_attention/lanes.h"

namespace cogvx::joint_attention::COGVX_ISA {
namespace {

#if defined(__clang__)
#define COGVX_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define COGVX_UNROLL _Pragma("GCC unroll 8")
#else
#define COGVX_UNROLL
#endif

constexpr int kBlockRows = 4;  // of `a` in a micro-kernel: 16 sums in registers, enough to hide their latency

template <class T> struct Kind {
  using Sum = accumulator_t<T>;
  using Word = Sum;
  static constexpr int kPair = 1;       // numbers a word
  static constexpr int kKeyTile = 64;   // a tile of keys and one of values fill most of the first cache
  static constexpr int kChain = 16;     // steps of a score that are added up one after another
  static constexpr bool kCoarse = false;

  static Word word(const T* x) { return widen(*x); }
  static Word last_word(const T* x) { return widen(*x); }
  static Word word(const T* x, const T*) { return widen(*x); }
  static Vec<Sum> multiply_add(Vec<Sum> sum, Word a, const Word* b) { return sum + a * load<Sum>(b); }
};

#ifdef __AVX512BF16__
template <> struct Kind<BFloat16> {
  using Sum = float;
  using Word = uint32_t;
  static constexpr int kPair = 2;
  static constexpr int kKeyTile = 128;
  static constexpr int kChain = 1 << 20;
  static constexpr bool kCoarse = true;

  static Word word(const BFloat16* x) { return word(x, x + 1); }
  static Word last_word(const BFloat16* x) { return x->bits; }
  static Word word(const BFloat16* x, const BFloat16* y) { return x->bits | static_cast<Word>(y->bits) << 16; }
  static Vec<float> multiply_add(Vec<float> sum, Word a, const Word* b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)_mm512_loadu_si512(b));
  }
};
#endif

template <class T> using Sum = typename Kind<T>::Sum;
template <class T> using Word = typename Kind<T>::Word;
template <class T> constexpr int kLanes = Lanes<Sum<T>>::count;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class T> inline int64_t steps_of(int64_t size) { return ceil_div(size, Kind<T>::kPair); }
template <class T> inline int64_t columns_of(int64_t size) { return round_up(size, kLanes<T>); }
template <class T> inline int64_t keys_of(int64_t size) { return round_up(size, kLanes<T> * Kind<T>::kPair); }

// How many vectors the panel has that begins at column `first`; the last may be narrower.
inline int64_t panel_vectors(int64_t columns, int64_t first, int lanes) {
  const int64_t left = (columns - first) / lanes;
  return left < kPanelVectors ? left : kPanelVectors;
}

// `count` rows of `width` numbers as rows of words, and then zeros up to `rows`.
template <class T>
void pack_left(const T* x, int64_t stride, int64_t count, int64_t rows, int64_t width, Word<T>* packed) {
  const int64_t whole = width / Kind<T>::kPair, steps = steps_of<T>(width);
  for (int64_t i = 0; i < count; ++i, x += stride, packed += steps) {
#pragma omp simd
    for (int64_t s = 0; s < whole; ++s) packed[s] = Kind<T>::word(x + s * Kind<T>::kPair);
    if (whole < steps) packed[whole] = Kind<T>::last_word(x + width - 1);
  }
  for (int64_t i = 0; i < (rows - count) * steps; ++i) packed[i] = 0;
}

// `count` rows of `width` numbers as columns of panels, and then zeros up to `columns`: steps are along a row.
template <class T>
void pack_transposed(const T* x, int64_t stride, int64_t count, int64_t columns, int64_t width, Word<T>* packed) {
  constexpr int kCount = kLanes<T>;
  const int64_t whole = width / Kind<T>::kPair, steps = steps_of<T>(width);
  for (int64_t first = 0; first < columns; first += kPanelVectors * kCount) {
    const int64_t panel = panel_vectors(columns, first, kCount) * kCount;
    for (int64_t j = 0; j < panel; j += kCount) {
      const int64_t left = count - first - j, filled = left < 0 ? 0 : left < kCount ? left : kCount;
      const T* row = x + (first + j) * stride;
      for (int64_t s = 0; s < steps; ++s) {
        Word<T>* target = packed + s * panel + j;
        for (int64_t i = 0; i < filled; ++i) {
          const T* from = row + i * stride + s * Kind<T>::kPair;
          target[i] = s < whole ? Kind<T>::word(from) : Kind<T>::last_word(from);
        }
        for (int64_t i = filled; i < kCount; ++i) target[i] = 0;
      }
    }
    packed += steps * panel;
  }
}

// `count` rows of `width` numbers as rows of panels, zeros around them: steps are along a column, `rows` numbers long.
template <class T>
void pack_rows(const T* x, int64_t stride, int64_t count, int64_t rows, int64_t width, Word<T>* packed) {
  const int64_t columns = columns_of<T>(width);
  for (int64_t first = 0; first < columns; first += kPanelVectors * kLanes<T>) {
    const int64_t panel = panel_vectors(columns, first, kLanes<T>) * kLanes<T>;
    const int64_t filled = width - first < panel ? width - first : panel;
    for (int64_t n = 0; n < rows; n += Kind<T>::kPair, packed += panel) {
      const T *row = x + n * stride + first, *next = row + stride;
      if (n + Kind<T>::kPair <= count) {
#pragma omp simd
        for (int64_t i = 0; i < filled; ++i) packed[i] = Kind<T>::word(row + i, next + i);
      } else if (n < count) {
        for (int64_t i = 0; i < filled; ++i) packed[i] = Kind<T>::last_word(row + i);
      }
      for (int64_t i = n < count ? filled : 0; i < panel; ++i) packed[i] = 0;
    }
  }
}

// The word of row r and step s is data[r * row + s * step].
template <class T> struct Left {
  const Word<T>* data;
  int64_t row, step;
};

template <class T, int kVectors, bool kAdd>
void micro_kernel_steps(const Left<T>& a, const Word<T>* b, int64_t steps, Sum<T>* c, int64_t stride) {
  Vec<Sum<T>> sums[kBlockRows][kVectors];  // unrolled early enough, these become registers
  COGVX_UNROLL
  for (int r = 0; r < kBlockRows; ++r)
    COGVX_UNROLL
    for (int i = 0; i < kVectors; ++i) sums[r][i] = Vec<Sum<T>>{};
  for (int64_t s = 0; s < steps; ++s, b += kVectors * kLanes<T>) {
    const Word<T>* words = a.data + s * a.step;
    COGVX_UNROLL
    for (int r = 0; r < kBlockRows; ++r)
      COGVX_UNROLL
      for (int i = 0; i < kVectors; ++i)
        sums[r][i] = Kind<T>::multiply_add(sums[r][i], words[r * a.row], b + i * kLanes<T>);
  }
  COGVX_UNROLL
  for (int r = 0; r < kBlockRows; ++r) {
    COGVX_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      Sum<T>* target = c + r * stride + i * kLanes<T>;
      put<Sum<T>>(target, kAdd ? load<Sum<T>>(target) + sums[r][i] : sums[r][i]);
    }
  }
}

// Sums of a few steps are added up, not one long chain: the scores may be large, and their errors are what counts.
template <class T, int kVectors, bool kAdd>
#ifdef __GNUC__
__attribute__((noinline))
#endif
void micro_kernel(Left<T> a, const Word<T>* b, int64_t steps, Sum<T>* c, int64_t stride) {
  constexpr int64_t kChain = Kind<T>::kChain;
  const int64_t chain = !kAdd && steps > kChain ? kChain : steps;
  micro_kernel_steps<T, kVectors, kAdd>(a, b, chain, c, stride);
  for (int64_t s = chain; s < steps; s += kChain) {
    a.data += kChain * a.step;
    b += kChain * kVectors * kLanes<T>;
    micro_kernel_steps<T, kVectors, true>(a, b, steps - s < kChain ? steps - s : kChain, c, stride);
  }
}

// kBlockRows rows of c [rows][stride] = a b, or += a b, over `columns` columns.
template <class T, bool kAdd>
void multiply(Left<T> a, const Word<T>* b, int64_t steps, int64_t columns, Sum<T>* c, int64_t stride) {
  for (int64_t first = 0; first < columns; first += kPanelVectors * kLanes<T>) {
    const int64_t vectors = panel_vectors(columns, first, kLanes<T>);
    if (vectors == kPanelVectors) micro_kernel<T, kPanelVectors, kAdd>(a, b, steps, c + first, stride);
    else if (vectors == 1) micro_kernel<T, 1, kAdd>(a, b, steps, c + first, stride);
    else if (vectors == 2) micro_kernel<T, 2, kAdd>(a, b, steps, c + first, stride);
    else micro_kernel<T, kPanelVectors - 1, kAdd>(a, b, steps, c + first, stride);
    b += steps * vectors * kLanes<T>;
  }
}

// The same as multiply<T, false>, but summed in double.
template <class T>
void multiply_exactly(Left<T> a, const Word<T>* b, int64_t steps, int64_t columns, Sum<T>* c, int64_t stride) {
  constexpr int kPanel = kPanelVectors * kLanes<T>;
  for (int64_t first = 0; first < columns; first += kPanel) {
    const int64_t panel = panel_vectors(columns, first, kLanes<T>) * kLanes<T>;
    for (int r = 0; r < kBlockRows; ++r) {
      double sums[kPanel] = {};
      for (int64_t s = 0; s < steps; ++s) {
        const double word = static_cast<double>(a.data[r * a.row + s * a.step]);
#pragma omp simd
        for (int64_t j = 0; j < panel; ++j) sums[j] += word * static_cast<double>(b[s * panel + j]);
      }
      for (int64_t j = 0; j < panel; ++j) c[r * stride + first + j] = static_cast<Sum<T>>(sums[j]);
    }
    b += steps * panel;
  }
}

// kBlockRows rows of products with `num_keys` keys. The fewer these are, the more a result hangs on the error of one.
template <class T>
void multiply_by_keys(Left<T> a, const Word<T>* keys, int64_t steps, int64_t num_keys, Sum<T>* c, int64_t stride) {
  constexpr int64_t kFew = 16;
  const int64_t columns = keys_of<T>(num_keys);
  if constexpr (Kind<T>::kPair == 1) {
    if (num_keys <= kFew) return multiply_exactly<T>(a, keys, steps, columns, c, stride);
  }
  multiply<T, false>(a, keys, steps, columns, c, stride);
}

}  // namespace
}  // namespace cogvx::joint_attention::COGVX_ISA
