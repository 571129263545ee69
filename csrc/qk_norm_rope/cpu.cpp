// Compiled once for each instruction set (COGVX_ISA names it). No standard containers here: their code would be shared
// between the variants, and one compiled for a newer processor could be linked into all.
//
// A thread takes a chunk of tokens head by head: it reads a few rows of qkv side by side, and what it writes for a head
// is one piece of memory.
#include "qk_norm_rope/qk_norm_rope.h"

#include <math.h>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include "qk_norm_rope/row64.h"
#define COGVX_ROW64
#endif

namespace cogvx::qk_norm_rope::COGVX_ISA {
namespace {

constexpr int kV = 2;  // the index of v among q, k, v

inline float square_root(float value) { return sqrtf(value); }
inline double square_root(double value) { return sqrt(value); }

template <class T> T* row_of(const Heads& heads, int64_t b, int64_t a, int64_t n) {
  return reinterpret_cast<T*>(heads.data) + b * heads.stride_b + a * heads.stride_a + n * heads.stride_n;
}

// One head's rows of one sample, for the tokens first <= n < last: what the loops over tokens need.
template <class T> struct Span {
  using A = accumulator_t<T>;
  int64_t first, last, num_text, width;
  A eps;
  const T* x;  // row n stands at x + n * stride
  int64_t stride;
  const A *weight, *bias;  // [E]; null for v
  const A *cos, *sin;      // of the first vision token, or null

  bool turns(int64_t n) const { return cos && n >= num_text; }
  int64_t angle(int64_t n) const { return (n - num_text) * width; }
};

// Each thread's buffers: the weights and biases of q and k in the arithmetic type, and four rows to work in.
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

template <class T>
Span<T> span(const Args& args, const Scratch<T>& scratch, int part, int64_t b, int64_t a, int64_t first, int64_t last) {
  using A = accumulator_t<T>;
  const T* x = reinterpret_cast<const T*>(args.qkv.data) + b * args.qkv.stride_b;
  const bool normed = part != kV;
  return {first, last, args.num_text, args.width, static_cast<A>(args.eps),
          x + (part * args.num_heads + a) * args.width, args.qkv.stride_n,
          normed ? scratch.weight(part) : nullptr, normed ? scratch.bias(part) : nullptr,
          reinterpret_cast<const A*>(args.cos), reinterpret_cast<const A*>(args.sin)};
}

// row = (x - mean) / sqrt(variance + eps); returns the factor. Two passes: the variance of the differences is accurate
// also where the mean is large.
template <class T> accumulator_t<T> normalize(const T* x, accumulator_t<T>* row, int64_t width, accumulator_t<T> eps) {
  using A = accumulator_t<T>;
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += row[i] = widen(x[i]);
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

// kWidth is the head width where it is known when this is compiled, else 0.
template <class T, int kWidth> void forward_rows(const Span<T>& at, T* y, const Scratch<T>& scratch) {
  using A = accumulator_t<T>;
  const int64_t width = kWidth ? kWidth : at.width;
  A *row = scratch.row(0), *turned = scratch.row(1);
  for (int64_t n = at.first; n < at.last; ++n, y += width) {
    normalize(at.x + n * at.stride, row, width, at.eps);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) row[i] = row[i] * at.weight[i] + at.bias[i];
    if (at.turns(n)) {
      const A *cos = at.cos + at.angle(n), *sin = at.sin + at.angle(n);
#pragma omp simd
      for (int64_t i = 0; i < width / 2; ++i) {
        turned[2 * i] = row[2 * i] * cos[2 * i] - row[2 * i + 1] * sin[2 * i];
        turned[2 * i + 1] = row[2 * i + 1] * cos[2 * i + 1] + row[2 * i] * sin[2 * i + 1];
      }
    }
    const A* result = at.turns(n) ? turned : row;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(y + i, result[i]);
  }
}

// Of v: from rows `from_stride` apart to rows `to_stride` apart.
template <class T, int kWidth>
void copy_rows(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t count, int64_t at_width) {
  const int64_t width = kWidth ? kWidth : at_width;
  for (int64_t n = 0; n < count; ++n, from += from_stride, to += to_stride)
    memcpy(to, from, static_cast<size_t>(width) * sizeof(T));
}

// The sums that a chunk keeps of each of q and k, [2, E].
template <class A> struct Sums {
  A *grad_xhat, *grad;
};

// The gradients of cos and sin for one row, added up: `grad` is the result's, `row` the normalized row with its affine.
template <class A> void add_angles(const A* grad, const A* row, A* grad_cos, A* grad_sin, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width / 2; ++i) {
    grad_cos[2 * i] += grad[2 * i] * row[2 * i];
    grad_cos[2 * i + 1] += grad[2 * i + 1] * row[2 * i + 1];
    grad_sin[2 * i] -= grad[2 * i] * row[2 * i + 1];
    grad_sin[2 * i + 1] += grad[2 * i + 1] * row[2 * i];
  }
}

// With g the gradient turned back and d = g * weight: grad_x = rstd * (d - mean(d) - xhat * mean(d * xhat)).
template <class T, int kWidth>
void backward_rows(const Span<T>& at, const T* grad_y, int64_t stride_y, T* grad_x, int64_t stride_x,
                   const Sums<accumulator_t<T>>& sums, accumulator_t<T>* grad_cos, accumulator_t<T>* grad_sin,
                   const Scratch<T>& scratch) {
  using A = accumulator_t<T>;
  const int64_t width = kWidth ? kWidth : at.width;
  A *xhat = scratch.row(0), *grad = scratch.row(1), *d = scratch.row(2), *z = scratch.row(3);
  for (int64_t n = at.first; n < at.last; ++n) {
    const A rstd = normalize(at.x + n * at.stride, xhat, width, at.eps);
    const T* g = grad_y + n * stride_y;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) grad[i] = widen(g[i]);
    if (at.turns(n)) {
      const A *cos = at.cos + at.angle(n), *sin = at.sin + at.angle(n);
      if (grad_cos) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) z[i] = xhat[i] * at.weight[i] + at.bias[i];
        add_angles(grad, z, grad_cos + at.angle(n), grad_sin + at.angle(n), width);
      }
#pragma omp simd
      for (int64_t i = 0; i < width / 2; ++i) {
        const A even = grad[2 * i], odd = grad[2 * i + 1];
        grad[2 * i] = even * cos[2 * i] + odd * sin[2 * i + 1];
        grad[2 * i + 1] = odd * cos[2 * i + 1] - even * sin[2 * i];
      }
    }
    // d is kept: a product fused into one sum and not into another leaves a difference where there is none.
    A mean_d = 0, mean_d_xhat = 0;
#pragma omp simd reduction(+ : mean_d, mean_d_xhat)
    for (int64_t i = 0; i < width; ++i) {
      d[i] = grad[i] * at.weight[i];
      mean_d += d[i];
      mean_d_xhat += d[i] * xhat[i];
      sums.grad_xhat[i] += grad[i] * xhat[i];
      sums.grad[i] += grad[i];
    }
    mean_d /= static_cast<A>(width);
    mean_d_xhat /= static_cast<A>(width);
    T* to = grad_x + n * stride_x;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(to + i, rstd * (d[i] - mean_d - xhat[i] * mean_d_xhat));
  }
}

#ifdef COGVX_ROW64

template <bool kStream, class T> void forward_rows64(const Span<T>& at, T* y) {
  const Row64 weight = load64(at.weight), bias = load64(at.bias);
  for (int64_t n = at.first; n < at.last; ++n, y += 64) {
    Row64 row = load64(at.x + n * at.stride);
    normalize64(row, at.eps);
    for (int i = 0; i < 4; ++i) row.v[i] = _mm512_fmadd_ps(row.v[i], weight.v[i], bias.v[i]);
    if (at.turns(n)) turn64(row, at.cos + at.angle(n), at.sin + at.angle(n));
    store64<kStream>(y, row);
  }
}

#endif

template <class T> void forward_head(const Span<T>& at, int part, T* y, const Scratch<T>& scratch, bool stream) {
  (void)stream;
#ifdef COGVX_ROW64
  if constexpr (sizeof(T) <= sizeof(float)) {
    if (at.width == 64) {
      if (part == kV) {
        const T* x = at.x + at.first * at.stride;
        for (int64_t n = at.first; n < at.last; ++n, x += at.stride, y += 64)
          stream ? copy64<true>(y, x) : copy64<false>(y, x);
      } else {
        stream ? forward_rows64<true>(at, y) : forward_rows64<false>(at, y);
      }
      return;
    }
  }
#endif
  if (part == kV)
    copy_rows<T, 0>(at.x + at.first * at.stride, at.stride, y, at.width, at.last - at.first, at.width);
  else if (at.width == 64)
    forward_rows<T, 64>(at, y, scratch);
  else
    forward_rows<T, 0>(at, y, scratch);
}

template <class T> void forward_as(const Args& args, int num_threads) {
  const int64_t per_sample = (args.num_rows + kChunk - 1) / kChunk, total = args.batch * per_sample;
  // More than a cache holds anyway.
  const bool stream = args.batch * args.num_rows * args.num_heads * args.width * 3 * sizeof(T) > (1u << 25) &&
      (reinterpret_cast<uintptr_t>(args.y[0].data) | reinterpret_cast<uintptr_t>(args.y[1].data) |
       reinterpret_cast<uintptr_t>(args.y[2].data)) % 64 == 0;
  (void)num_threads;  // unused without OpenMP
#pragma omp parallel num_threads(num_threads) if (total > 1)
  {
    const Scratch<T> scratch(args);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < total; ++index) {
      const int64_t b = index / per_sample, first = index % per_sample * kChunk;
      const int64_t last = first + kChunk < args.num_rows ? first + kChunk : args.num_rows;
      for (int part = 0; part < 3; ++part)
        for (int64_t a = 0; a < args.num_heads; ++a)
          forward_head(span(args, scratch, part, b, a, first, last), part, row_of<T>(args.y[part], b, a, first),
                       scratch, stream);
    }
#ifdef COGVX_ROW64
    _mm_sfence();  // streamed stores are seen by other threads after it
#endif
  }
}

template <class T> void backward_as(const Args&, int) {}

}  // namespace

void forward(const Args& args, int num_threads) {
  switch (args.dtype) {
    case DType::float32: return forward_as<float>(args, num_threads);
    case DType::float16: return forward_as<Half>(args, num_threads);
    case DType::bfloat16: return forward_as<BFloat16>(args, num_threads);
    case DType::float64: return forward_as<double>(args, num_threads);
  }
}

void backward(const Args& args, int num_threads) {
  switch (args.dtype) {
    case DType::float32: return backward_as<float>(args, num_threads);
    case DType::float16: return backward_as<Half>(args, num_threads);
    case DType::bfloat16: return backward_as<BFloat16>(args, num_threads);
    case DType::float64: return backward_as<double>(args, num_threads);
  }
}

}  // namespace cogvx::qk_norm_rope::COGVX_ISA
