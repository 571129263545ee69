// GroupNorm followed by SiLU, row by row: what `group_norm_silu` and `spatial_norm_silu` do alike on CPUs.
//
// A row is what lies side by side: the channels of a pixel, or in the other memory order some pixels of a channel. Its
// values have coefficients of their own, so the loops below are the same for both:
// y = silu(v) with v = (x - mean) * factor + offset.
//
// To be included by a cpu.cpp alone. Functions are `static` and classes nameless elsewhere: every instruction set gets
// its own copy, and none can be linked into another's code.
#pragma once

#include <math.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/silu.h"
#include "common/video.h"

namespace cogvx {
namespace {

constexpr int64_t kRun = 128;         // rows whose statistics are added up in the arithmetic type, and then in double
constexpr int64_t kGradientRun = 16;  // the same for gradients
constexpr int64_t kBlock = 1 << 16;   // values of a block of pixels, about: one thread's turn
constexpr int64_t kAhead = 4096;      // values
constexpr int64_t kLanes = 64;        // values of a row where a channel's pixels lie side by side

template <class A> struct Scratch {  // zeros of one thread or call: rows of a width, from the start of a cache line
  static constexpr size_t kLine = 64;
  char* memory;
  A* data;
  int64_t width;
  Scratch(int64_t count, int64_t row_width)
      : memory(new char[count * row_width * sizeof(A) + kLine]()), data(aligned(memory)), width(row_width) {}
  ~Scratch() { delete[] memory; }
  static A* aligned(char* from) {
    return reinterpret_cast<A*>(from + (kLine - reinterpret_cast<uintptr_t>(from) % kLine));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* row(int64_t i) const { return data + i * width; }
};

// Asks for values that will be read soon, where the processor does not foresee it; they need not exist.
template <class T> void fetch(const T* from, int64_t count) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i);
#else
  (void)from, (void)count;
#endif
}

template <class A> struct Coefficients {
  const A *mean, *factor, *offset;
};

// Forward, 16 bits need no difference from the mean: float holds enough of them for (offset - mean * factor).
template <class T> constexpr bool kIsCentered = sizeof(T) > 2;

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

template <class T> void apply_row(const T* x, T* y, int64_t width, const Coefficients<accumulator_t<T>>& of) {
  using A = accumulator_t<T>;
  int64_t start = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) < sizeof(double)) {
    for (; start + 16 <= width; start += 16) {
      __m512 centered = load16(x + start);
      if (kIsCentered<T>) centered = _mm512_sub_ps(centered, load16(of.mean + start));
      store16(y + start, silu<T>(_mm512_fmadd_ps(centered, load16(of.factor + start), load16(of.offset + start))));
    }
  }
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
void apply_rows(const T* x, T* y, int64_t count, int64_t width, const Coefficients<accumulator_t<T>>& of) {
  for (int64_t n = 0; n < count; ++n) apply_row(x + n * width, y + n * width, width, of);
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

template <class A> void fill(A* row, int64_t width, A value) {
  for (int64_t i = 0; i < width; ++i) row[i] = value;
}

// Mean and sum of squared differences from it, of `count` values.
struct Moments {
  double count, mean, squares;

  void add(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, difference = other.mean - mean;
    mean += difference * (other.count / total);
    squares += other.squares + difference * difference * (count * other.count / total);
    count = total;
  }
};

// Consecutive pixels of one frame; which they are depends on the sizes alone, not on the number of threads.
struct Block {
  int64_t b, frame, first, last;
};

inline int64_t pixels_of_block(const Video& video) {
  const int64_t pixels = kBlock / video.channels;
  return pixels < 1 ? 1 : pixels < video.pixels ? pixels : video.pixels;
}

inline int64_t blocks_of_sample(const Video& video) {
  const int64_t size = pixels_of_block(video);
  return video.frames * ((video.pixels + size - 1) / size);
}

inline Block block_at(const Video& video, int64_t index) {
  const int64_t size = pixels_of_block(video), of_frame = (video.pixels + size - 1) / size;
  const int64_t first = index % of_frame * size, last = first + size < video.pixels ? first + size : video.pixels;
  return {index / of_frame / video.frames, index / of_frame % video.frames, first, last};
}

// Sums of differences from `shift` and of their squares: exact enough in float where the mean is large.
template <class T, class A>
void moments_rows(const T* x, int64_t count, int64_t width, const A* shift, A* sum, A* squares) {
  int64_t n = 0;
  for (; n + 4 <= count; n += 4) {
    const T *x0 = x + n * width, *x1 = x0 + width, *x2 = x1 + width, *x3 = x2 + width;
    fetch(x0 + kAhead, 4 * width);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const A d0 = static_cast<A>(widen(x0[i])) - shift[i], d1 = static_cast<A>(widen(x1[i])) - shift[i];
      const A d2 = static_cast<A>(widen(x2[i])) - shift[i], d3 = static_cast<A>(widen(x3[i])) - shift[i];
      sum[i] += (d0 + d1) + (d2 + d3);
      squares[i] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    }
  }
  for (; n < count; ++n) {
    const T* row = x + n * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const A d = static_cast<A>(widen(row[i])) - shift[i];
      sum[i] += d;
      squares[i] += d * d;
    }
  }
}

// Moments of each group over one block of pixels.
template <class T, class A>
void block_moments(const Video& x, const Block& block, int64_t num_groups, const Scratch<A>& rows,
                   const Scratch<double>& totals, Moments* groups) {
  const int64_t channels = x.channels, width = channels / num_groups;
  A *shift = rows.row(0), *sum = rows.row(1), *squares = rows.row(2);
  double *mean = totals.row(0), *total = totals.row(1);
  for (int64_t first = block.first; first < block.last; first += kRun) {
    const int64_t last = first + kRun < block.last ? first + kRun : block.last;
    const T* start = at<T>(x, block.b, 0, block.frame, first);
    for (int64_t c = 0; c < channels; ++c) shift[c] = widen(start[c]);
    fill(sum, 2 * channels, A{0});
    moments_rows(start, last - first, channels, shift, sum, squares);
    // The formula of Moments::add, for all channels together.
    const double count = static_cast<double>(last - first), before = static_cast<double>(first - block.first);
    const double share = count / (before + count), weight = before * share;
    if (before == 0) fill(mean, 2 * channels, 0.0);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const double s = sum[c], difference = shift[c] + s / count - mean[c];
      mean[c] += difference * share;
      total[c] += (squares[c] - s * s / count) + difference * difference * weight;
    }
  }
  const double count = static_cast<double>(block.last - block.first);
  for (int64_t g = 0; g < num_groups; ++g) {
    double sum = 0, within = 0, between = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) sum += mean[c];
    const double middle = sum / static_cast<double>(width);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      within += total[c];
      between += (mean[c] - middle) * (mean[c] - middle);
    }
    groups[g] = {count * static_cast<double>(width), middle, within + count * between};
  }
}

// Moments of one channel whose pixels lie side by side.
template <class T, class A> Moments plane_moments(const T* x, int64_t count, const Scratch<A>& rows) {
  A *shift = rows.row(0), *sum = rows.row(1), *squares = rows.row(2);
  Moments result{0, 0, 0};
  for (int64_t first = 0; first < count; first += kRun * kLanes) {
    const int64_t values = count - first < kRun * kLanes ? count - first : kRun * kLanes;
    const int64_t whole = values / kLanes, rest = values % kLanes;
    fill(shift, kLanes, static_cast<A>(widen(x[first])));
    fill(sum, 2 * kLanes, A{0});
    moments_rows(x + first, whole, kLanes, shift, sum, squares);
    moments_rows(x + first + whole * kLanes, rest ? 1 : 0, rest, shift, sum, squares);
    double total = 0, total_squares = 0;
    for (int64_t i = 0; i < kLanes; ++i) {
      total += sum[i];
      total_squares += squares[i];
    }
    const double n = static_cast<double>(values);
    result.add({n, shift[0] + total / n, total_squares - total * total / n});
  }
  return result;
}

// mean and 1 / sqrt(variance + eps) of every channel, [B, C] each. The same whatever the number of threads.
template <class T, class A>
void group_statistics(const Video& x, int64_t num_groups, double eps, double* mean, double* rstd, int num_threads) {
  const int64_t width = x.channels / num_groups;
  const int64_t parts = x.channels_last ? blocks_of_sample(x) : x.channels;  // of a sample
  const int64_t of_part = x.channels_last ? num_groups : 1;                  // moments
  const Scratch<Moments> moments(x.batch * parts, of_part);
  (void)num_threads;  // unused without OpenMP
#pragma omp parallel num_threads(num_threads) if (x.batch * parts > 1)
  {
    const Scratch<A> rows(3, x.channels_last ? x.channels : kLanes);
    const Scratch<double> totals(2, x.channels_last ? x.channels : 0);
#pragma omp for schedule(static)
    for (int64_t part = 0; part < x.batch * parts; ++part) {
      if (x.channels_last)
        block_moments<T>(x, block_at(x, part), num_groups, rows, totals, moments.row(part));
      else
        *moments.row(part) = plane_moments(at<T>(x, part / parts, part % parts, 0, 0), x.frames * x.pixels, rows);
    }
  }
  for (int64_t b = 0; b < x.batch; ++b) {
    for (int64_t g = 0; g < num_groups; ++g) {
      Moments all{0, 0, 0};
      if (x.channels_last)
        for (int64_t part = 0; part < parts; ++part) all.add(moments.row(b * parts + part)[g]);
      else
        for (int64_t c = g * width; c < (g + 1) * width; ++c) all.add(*moments.row(b * parts + c));
      const double variance = all.squares > 0 ? all.squares / all.count : 0;
      fill(mean + b * x.channels + g * width, width, all.mean);
      fill(rstd + b * x.channels + g * width, width, 1 / sqrt(variance + eps));
    }
  }
}

// GroupNorm(x) * weight + bias is (x - mean) * factor + offset, [B, C] each. The mean is rounded, or 0 where it is not
// subtracted, and the offset makes up for it.
template <class T, class A> struct Affine {
  Scratch<double> statistics;       // mean, rstd
  Scratch<A> coefficients, of_all;  // mean, factor, offset; weight, bias [C]

  template <class Args>
  Affine(const Args& args, bool is_centered, int num_threads)
      : statistics(2, args.x.batch * args.x.channels),
        coefficients(3, args.x.batch * args.x.channels),
        of_all(2, args.x.channels) {
    const Video& x = args.x;
    group_statistics<T, A>(x, args.num_groups, args.eps, statistics.row(0), statistics.row(1), num_threads);
    widen_to(args.weight_dtype, args.weight, x.channels, of_all.row(0));
    widen_to(args.weight_dtype, args.bias, x.channels, of_all.row(1));
    for (int64_t i = 0; i < x.batch * x.channels; ++i) {
      const double factor = statistics.row(1)[i] * of_all.row(0)[i % x.channels], mean = statistics.row(0)[i];
      coefficients.row(0)[i] = is_centered ? static_cast<A>(mean) : A{0};
      coefficients.row(1)[i] = static_cast<A>(factor);
      const double error = coefficients.row(0)[i] - mean;
      coefficients.row(2)[i] = static_cast<A>(of_all.row(1)[i % x.channels] + error * factor);
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
