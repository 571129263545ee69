// Mean and variance of the groups of channels of a chunk of video.
//
// To be included by a cpu.cpp alone: everything is in an unnamed namespace, so every instruction set gets its own copy.
#pragma once

#include <math.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/floats.h"
#include "common/scratch.h"
#include "common/video.h"

namespace cogvx {
namespace {

constexpr int64_t kRun = 128;        // rows whose statistics are added up in the arithmetic type, and then in double
constexpr int64_t kBlock = 1 << 16;  // values of a block of pixels, about: one thread's turn
constexpr int64_t kAhead = 8192;     // bytes
constexpr int64_t kLanes = 64;       // values of a row where a channel's pixels lie side by side

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

#if defined(__AVX2__)
// Four rows whose width fills registers. The lines to come are asked for in the order of their addresses: four
// rows side by side are more than the processor foresees.
template <class T>
void moments_together(const T* x, int64_t width, const float* shift, float* sum, float* squares) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < width; i += kFloats) {
    if (i % kLine == 0) fetch(x + 4 * i + kAhead / static_cast<int64_t>(sizeof(T)), 4 * kLine);
    const Floats from = load(shift + i);
    const Floats d0 = load(x + i) - from, d1 = load(x + width + i) - from;
    const Floats d2 = load(x + 2 * width + i) - from, d3 = load(x + 3 * width + i) - from;
    put(sum + i, load(sum + i) + ((d0 + d1) + (d2 + d3)), false);
    put(squares + i, load(squares + i) + ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)), false);
  }
}
#endif

// Sums of differences from `shift` and of their squares: exact enough in float where the mean is large.
template <class T, class A>
void moments_rows(const T* x, int64_t count, int64_t width, const A* shift, A* sum, A* squares) {
  int64_t n = 0;
  for (; n + 4 <= count; n += 4) {
    const T *x0 = x + n * width, *x1 = x0 + width, *x2 = x1 + width, *x3 = x2 + width;
#if defined(__AVX2__)
    if constexpr (sizeof(T) < sizeof(double) && sizeof(A) == sizeof(float)) {
      if (width % kFloats == 0) {
        moments_together(x0, width, shift, sum, squares);
        continue;
      }
    }
#endif
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
    const double share = count / (before + count), weight = before * share, one = 1 / count;
    if (before == 0) fill(mean, 2 * channels, 0.0);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const double s = sum[c], difference = shift[c] + s * one - mean[c];
      mean[c] += difference * share;
      total[c] += (squares[c] - s * s * one) + difference * difference * weight;
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

}  // namespace
}  // namespace cogvx
