// The rows of one head in plain loops, for any width. Included by cpu.cpp alone, once for each instruction set.
#pragma once

#include <math.h>
#include <string.h>

#include "common/dtype.h"
#include "qk_norm_rope/qk_norm_rope.h"

namespace cogvx::qk_norm_rope::COGVX_ISA {
namespace {

// One head's rows of one sample, for the tokens first <= n < last: what the loops over tokens need.
template <class T> struct Span {
  using A = accumulator_t<T>;
  int64_t first, last, num_text, width;
  A eps;
  const T* x;  // row n stands at x + n * stride
  int64_t stride;
  const A *weight, *bias;  // [E]; null for v
  const A *cos, *sin;      // of the first vision token, or null
  bool rounded;            // see Args

  bool turns(int64_t n) const { return cos && n >= num_text; }
  int64_t angle(int64_t n) const { return (n - num_text) * width; }
};

// What the backward pass of one head's rows reads and writes beside its span.
template <class T> struct Gradients {
  using A = accumulator_t<T>;
  const T* y;  // row n at y + n * stride_y
  int64_t stride_y;
  T* x;
  int64_t stride_x;
  double *weight, *bias;  // [E], to be added to
  double *cos, *sin;      // of the first vision token, to be added to, or null
};

// Each thread's buffers: the weights and biases of q and k in the arithmetic type, and rows to work in.
template <class T> struct Scratch {
  using A = accumulator_t<T>;
  A* data;
  int64_t width;
  explicit Scratch(const Args& args) : data(new A[8 * args.width]), width(args.width) {
    for (int part = 0; part < 2; ++part) {
      for (int64_t i = 0; i < width; ++i) {
        weight(part)[i] = widen(reinterpret_cast<const T*>(args.weight[part])[i]);
        bias(part)[i] = widen(reinterpret_cast<const T*>(args.bias[part])[i]);
      }
    }
  }
  ~Scratch() { delete[] data; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* weight(int part) const { return data + part * width; }
  A* bias(int part) const { return data + (2 + part) * width; }
  A* row(int i) const { return data + (4 + i) * width; }
};

inline float square_root(float value) { return sqrtf(value); }
inline double square_root(double value) { return sqrt(value); }

// A chunk's rows lie too far apart for the processor to foresee the next reads: those of the head after the next.
template <class T> void fetch_ahead(const T* x, int64_t width) {
#if defined(__GNUC__)
  const char* from = reinterpret_cast<const char*>(x + 2 * width);
  for (int64_t i = 0; i < width * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(from + i);
#else
  (void)x, (void)width;
#endif
}

// row = (x - mean) / sqrt(variance + eps); returns the factor. Two passes, and from the first value on: the differences
// keep their digits also where the mean is far larger.
template <class T> accumulator_t<T> normalize(const T* x, accumulator_t<T>* row, int64_t width, accumulator_t<T> eps) {
  using A = accumulator_t<T>;
  const A start = widen(x[0]);
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += row[i] = widen(x[i]) - start;
  const A mean = sum / static_cast<A>(width);
  A squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) {
    row[i] -= mean;
    squares += row[i] * row[i];
  }
  const A rstd = 1 / square_root(squares / static_cast<A>(width) + eps);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) row[i] *= rstd;
  return rstd;
}

// `value` with the digits that T has.
template <class T> accumulator_t<T> as_held(accumulator_t<T> value) {
  T held;
  store(&held, value);
  return widen(held);
}

// Each pair of `row`, turned; kRounded as Args says.
template <class T, bool kRounded, class A>
inline void turn(A* row, const A* cos, const A* sin, A* turned, int64_t width) {
  const auto held = [](A value) { return kRounded ? as_held<T>(value) : value; };
#pragma omp simd
  for (int64_t i = 0; i < width / 2; ++i) {
    const A even = held(row[2 * i]), odd = held(row[2 * i + 1]);
    turned[2 * i] = held(even * cos[2 * i]) - held(odd * sin[2 * i]);
    turned[2 * i + 1] = held(odd * cos[2 * i + 1]) + held(even * sin[2 * i + 1]);
  }
}

// kWidth is the head width where it is known when this is compiled, else 0.
template <class T, int kWidth> void forward_rows(const Span<T>& at, T* y, const Scratch<T>& scratch) {
  using A = accumulator_t<T>;
  const int64_t width = kWidth ? kWidth : at.width;
  A local[kWidth ? 2 * kWidth : 1];  // the compiler knows that nothing else points here
  A *row = kWidth ? local : scratch.row(0), *turned = kWidth ? local + kWidth : scratch.row(1);
  for (int64_t n = at.first; n < at.last; ++n, y += width) {
    const T* x = at.x + n * at.stride;
    fetch_ahead(x, width);
    normalize(x, row, width, at.eps);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) row[i] = row[i] * at.weight[i] + at.bias[i];
    if (at.turns(n)) {
      const A *cos = at.cos + at.angle(n), *sin = at.sin + at.angle(n);
      at.rounded ? turn<T, true>(row, cos, sin, turned, width) : turn<T, false>(row, cos, sin, turned, width);
    }
    const A* result = at.turns(n) ? turned : row;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(y + i, result[i]);
  }
}

// Of v: from rows `from_stride` apart to rows `to_stride` apart.
template <class T>
void copy_rows(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t count, int64_t width) {
  for (int64_t n = 0; n < count; ++n, from += from_stride, to += to_stride)
    memcpy(to, from, static_cast<size_t>(width) * sizeof(T));
}

// The gradients of cos and sin for one row: `grad` is the result's, `z` the row before it turned.
template <class A> void add_angles(const A* grad, const A* z, double* grad_cos, double* grad_sin, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width / 2; ++i) {
    grad_cos[2 * i] += grad[2 * i] * z[2 * i];
    grad_cos[2 * i + 1] += grad[2 * i + 1] * z[2 * i + 1];
    grad_sin[2 * i] -= grad[2 * i] * z[2 * i + 1];
    grad_sin[2 * i + 1] += grad[2 * i + 1] * z[2 * i];
  }
}

// With g the result's gradient turned back and d = g * weight: grad_x = rstd * (d - mean(d) - xhat * mean(d * xhat)).
template <class T, int kWidth>
void backward_rows(const Span<T>& at, const Gradients<T>& grads, const Scratch<T>& scratch) {
  using A = accumulator_t<T>;
  const int64_t width = kWidth ? kWidth : at.width;
  A *xhat = scratch.row(0), *g = scratch.row(1), *d = scratch.row(2), *z = scratch.row(3);
  for (int64_t n = at.first; n < at.last; ++n) {
    const A rstd = normalize(at.x + n * at.stride, xhat, width, at.eps);
    const T* grad_y = grads.y + n * grads.stride_y;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) g[i] = widen(grad_y[i]);
    if (at.turns(n)) {
      if (grads.cos) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) z[i] = xhat[i] * at.weight[i] + at.bias[i];
        add_angles(g, z, grads.cos + at.angle(n), grads.sin + at.angle(n), width);
      }
      const A *cos = at.cos + at.angle(n), *sin = at.sin + at.angle(n);
#pragma omp simd
      for (int64_t i = 0; i < width / 2; ++i) {
        const A even = g[2 * i], odd = g[2 * i + 1];
        g[2 * i] = even * cos[2 * i] + odd * sin[2 * i + 1];
        g[2 * i + 1] = odd * cos[2 * i + 1] - even * sin[2 * i];
      }
    }
    // d is kept: a product fused into one sum and not into another leaves a difference where there is none.
    A mean_d = 0, mean_d_xhat = 0;
#pragma omp simd reduction(+ : mean_d, mean_d_xhat)
    for (int64_t i = 0; i < width; ++i) {
      d[i] = g[i] * at.weight[i];
      mean_d += d[i];
      mean_d_xhat += d[i] * xhat[i];
      grads.weight[i] += g[i] * xhat[i];
      grads.bias[i] += g[i];
    }
    mean_d /= static_cast<A>(width);
    mean_d_xhat /= static_cast<A>(width);
    T* grad_x = grads.x + n * grads.stride_x;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(grad_x + i, rstd * (d[i] - mean_d - xhat[i] * mean_d_xhat));
  }
}

}  // namespace
}  // namespace cogvx::qk_norm_rope::COGVX_ISA
