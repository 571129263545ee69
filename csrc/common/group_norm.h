// GroupNorm followed by SiLU, row by row: what `group_norm_silu` and `spatial_norm_silu` do alike on CPUs.
//
// A row is what lies side by side: the channels of a pixel, or in the other memory order some pixels of a channel. Its
// values have coefficients of their own, so the loops below are the same for both:
// v = (x - mean) * factor + offset, and y = silu(v). Forward, factor and offset are those of kSiluUnit * v.
//
// To be included by a cpu.cpp alone: everything is in an unnamed namespace, so every instruction set gets its own copy.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/group_statistics.h"
#include "common/scratch.h"
#include "common/silu.h"
#include "common/video.h"

namespace cogvx {
namespace {

constexpr int kRegisters = 4;         // whose values go through SiLU together
constexpr int64_t kGradientRun = 16;  // rows whose gradients are added up in the arithmetic type, and then in double

template <class A> struct Coefficients {
  const A *mean, *factor, *offset;
};

// Forward, 16 bits need no difference from the mean: float holds enough of them for (offset - mean * factor).
template <class T> constexpr bool kIsCentered = sizeof(T) > 2;

// Results above this size leave the caches before anyone reads them. Written past these, memory is not first read, and
// more of x is still there when it is read again. It takes rows of whole cache lines.
constexpr int64_t kStreamedBytes = int64_t{32} << 20;

template <class T> bool is_streamed(const Video& y) {
#if defined(__AVX2__)
  const int64_t row = y.channels * static_cast<int64_t>(sizeof(T)), bytes = y.batch * y.frames * y.pixels * row;
  const bool whole = row % 64 == 0 && reinterpret_cast<uintptr_t>(y.data) % 64 == 0;
  return sizeof(T) < sizeof(double) && y.channels_last && whole && bytes > kStreamedBytes;
#else
  (void)y;
  return false;
#endif
}

// After the last streamed row of a thread, so that others see them.
inline void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Values taken into the arithmetic type and rounded back; loops of their own, because vectors change their length here.
template <class T, class A> void widen_row(const T* from, A* to, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) to[i] = widen(from[i]);
}
template <class T, class A> void round_row(const A* from, T* to, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) store(to + i, static_cast<accumulator_t<T>>(from[i]));
}

#if defined(__F16C__)
inline void widen_row(const Half* from, float* to, int64_t width) {
  int64_t i = 0;
  for (; i + 8 <= width; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < width; ++i) to[i] = widen(from[i]);
}
inline void round_row(const float* from, Half* to, int64_t width) {
  int64_t i = 0;
  for (; i + 8 <= width; i += 8) {
    const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), bits);
  }
  for (; i < width; ++i) store(to + i, from[i]);
}
#endif

#if defined(__AVX2__)
// kCount registers side by side of a row.
template <class T, int kCount>
void apply_together(const T* x, T* y, const Coefficients<float>& of, int64_t start, bool streamed) {
  Floats t[kCount];
  fetch(x + start + kAhead / static_cast<int64_t>(sizeof(T)), kCount * kFloats);
#pragma GCC unroll 8
  for (int n = 0; n < kCount; ++n) {
    const int64_t i = start + n * kFloats;
    t[n] = load(x + i);
    if (kIsCentered<T>) t[n] -= load(of.mean + i);
    t[n] = t[n] * load(of.factor + i) + load(of.offset + i);
  }
  silu_together<T>(t);
  put(y + start, t, streamed);
}
#endif

template <class T>
void apply_row(const T* x, T* y, int64_t width, const Coefficients<accumulator_t<T>>& of, bool streamed) {
  using A = accumulator_t<T>;
  int64_t start = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(T) < sizeof(double)) {
    for (; start + kRegisters * kFloats <= width; start += kRegisters * kFloats)
      apply_together<T, kRegisters>(x, y, of, start, streamed);
    for (; start + kFloats <= width; start += kFloats) apply_together<T, 1>(x, y, of, start, streamed);
  }
#else
  (void)streamed;
#endif
  if constexpr (sizeof(T) > 2) {
#pragma omp simd
    for (int64_t i = start; i < width; ++i) y[i] = silu<T>((x[i] - of.mean[i]) * of.factor[i] + of.offset[i]);
    return;
  }
  constexpr int64_t kPiece = 256;
  A piece[kPiece];
  for (; start < width; start += kPiece) {
    const int64_t count = width - start < kPiece ? width - start : kPiece;
    const A *factor = of.factor + start, *offset = of.offset + start;
    widen_row(x + start, piece, count);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) piece[i] = silu<T>(piece[i] * factor[i] + offset[i]);
    round_row(piece, y + start, count);
  }
}

// Rows one after another that share their coefficients.
template <class T>
void apply_rows(const T* x, T* y, int64_t count, int64_t width, const Coefficients<accumulator_t<T>>& of,
                bool streamed) {
  if (streamed)  // a constant for the compiler
    for (int64_t n = 0; n < count; ++n) apply_row(x + n * width, y + n * width, width, of, true);
  else
    for (int64_t n = 0; n < count; ++n) apply_row(x + n * width, y + n * width, width, of, false);
}

// Adds to each sum of the row: d = dL/dv, and d * (x - mean).
template <class T, class A>
void sum_row(const T* x, const A* grad, int64_t width, const Coefficients<A>& of, A* sum_d, A* sum_d_x) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const A centered = static_cast<A>(widen(x[i])) - of.mean[i];
    const A d = grad[i] * silu_derivative<T>(centered * of.factor[i] + of.offset[i]);
    sum_d[i] += d;
    sum_d_x[i] += d * centered;
  }
}

// dL/dx = d * factor + constant + (x - mean) * slope.
template <class T, class A>
void gradient_row(const T* x, const A* grad, T* grad_x, int64_t width, const Coefficients<A>& of, const A* constant,
                  const A* slope) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const A centered = static_cast<A>(widen(x[i])) - of.mean[i];
    const A d = grad[i] * silu_derivative<T>(centered * of.factor[i] + of.offset[i]);
    store(grad_x + i, static_cast<accumulator_t<T>>(d * of.factor[i] + (constant[i] + centered * slope[i])));
  }
}

// The gradient of y's row: that of the frame itself, and of its copies where there are some.
template <class T, class A> struct Gradient {
  Video video;
  int64_t num_halo, num_copies;
  A* buffer;

  const A* row(int64_t b, int64_t channel, int64_t frame, int64_t pixel, int64_t width) const {
    const T* own = at<T>(video, b, channel, num_halo + frame, pixel);
    widen_row(own, buffer, width);
    for (int64_t copy = 0; frame == 0 && copy < num_copies; ++copy) {
      const T* other = at<T>(video, b, channel, copy, pixel);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) buffer[i] += widen(other[i]);
    }
    return buffer;
  }
};

template <class A> void widen_to(DType dtype, const char* from, int64_t count, A* to) {
  for (int64_t i = 0; i < count; ++i) {
    switch (dtype) {
      case DType::float32: to[i] = static_cast<A>(reinterpret_cast<const float*>(from)[i]); break;
      case DType::float16: to[i] = widen(reinterpret_cast<const Half*>(from)[i]); break;
      case DType::bfloat16: to[i] = widen(reinterpret_cast<const BFloat16*>(from)[i]); break;
      case DType::float64: to[i] = static_cast<A>(reinterpret_cast<const double*>(from)[i]); break;
    }
  }
}

// GroupNorm(x) * weight + bias is (x - mean) * factor + offset, [B, C] each. The mean is rounded, or 0 where it is not
// subtracted, and the offset makes up for it. `unit` is a factor of both.
template <class T, class A> struct Affine {
  Scratch<double> statistics;       // mean, rstd
  Scratch<A> coefficients, of_all;  // mean, factor, offset; weight, bias [C]
  A unit;

  template <class Args>
  Affine(const Args& args, bool is_centered, double times, int num_threads)
      : statistics(2, args.x.batch * args.x.channels),
        coefficients(3, args.x.batch * args.x.channels),
        of_all(2, args.x.channels),
        unit(static_cast<A>(times)) {
    const Video& x = args.x;
    group_statistics<T, A>(x, args.num_groups, args.eps, statistics.row(0), statistics.row(1), num_threads);
    widen_to(args.weight_dtype, args.weight, x.channels, of_all.row(0));
    widen_to(args.weight_dtype, args.bias, x.channels, of_all.row(1));
    for (int64_t i = 0; i < x.batch * x.channels; ++i) {
      const double factor = statistics.row(1)[i] * of_all.row(0)[i % x.channels], mean = statistics.row(0)[i];
      coefficients.row(0)[i] = is_centered ? static_cast<A>(mean) : A{0};
      coefficients.row(1)[i] = static_cast<A>(times * factor);
      const double error = coefficients.row(0)[i] - mean;
      coefficients.row(2)[i] = static_cast<A>(times * (of_all.row(1)[i % x.channels] + error * factor));
    }
  }

  Coefficients<A> of(int64_t b, int64_t channel) const {
    const int64_t i = b * of_all.width + channel;
    return {coefficients.row(0) + i, coefficients.row(1) + i, coefficients.row(2) + i};
  }
};

// `sums` [B, 2, C]: of d * scale and of d * scale * (x - mean) over a sample's pixels, with d = dL/dv and v = (xhat *
// weight + bias) * scale + shift. Yields the gradients of weight and bias, [C] each, and `constant` and `slope`, [B, C]
// each, of dL/dx = d * rstd * weight * scale + constant + (x - mean) * slope.
template <class A>
void finish_gradients(const Video& x, int64_t num_groups, const double* rstd, const A* weight, const double* sums,
                      A* grad_weight, A* grad_bias, A* constant, A* slope) {
  const int64_t width = x.channels / num_groups;
  const double count = static_cast<double>(width * x.frames * x.pixels);
  for (int64_t c = 0; c < x.channels; ++c) {
    double of_weight = 0, of_bias = 0;
    for (int64_t b = 0; b < x.batch; ++b) {
      of_bias += sums[2 * b * x.channels + c];
      of_weight += sums[(2 * b + 1) * x.channels + c] * rstd[b * x.channels + c];
    }
    grad_weight[c] = static_cast<A>(of_weight);
    grad_bias[c] = static_cast<A>(of_bias);
  }
  for (int64_t b = 0; b < x.batch; ++b) {
    const double *sum = sums + 2 * b * x.channels, *sum_x = sum + x.channels;
    for (int64_t first = 0; first < x.channels; first += width) {
      double mean = 0, mean_x = 0;
      for (int64_t c = first; c < first + width; ++c) {
        mean += sum[c] * weight[c];
        mean_x += sum_x[c] * weight[c];
      }
      const double r = rstd[b * x.channels + first];
      fill(constant + b * x.channels + first, width, static_cast<A>(-r * mean / count));
      fill(slope + b * x.channels + first, width, static_cast<A>(-r * r * r * mean_x / count));
    }
  }
}

}  // namespace
}  // namespace cogvx
