// Compiled once for each instruction set (COGVX_ISA names it). No standard containers here: their code would be shared
// between the variants, and one compiled for a newer processor could be linked into all.
//
// A thread takes a chunk of tokens head by head: it reads a few rows of qkv side by side, and what it writes for a head
// is one piece of memory.
#include "qk_norm_rope/qk_norm_rope.h"

#include <math.h>
#include <string.h>

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

// Each thread's buffers: the weights and biases of q and k in the arithmetic type, and rows to work in.
template <class T> struct Scratch {
  using A = accumulator_t<T>;
  A* data;
  int64_t width;
  explicit Scratch(const Args& args) : data(new A[10 * args.width]), width(args.width) {
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
template <class T>
void copy_rows(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t count, int64_t width) {
  for (int64_t n = 0; n < count; ++n, from += from_stride, to += to_stride)
    memcpy(to, from, static_cast<size_t>(width) * sizeof(T));
}

// What the backward pass of one head's rows reads and writes beside its span.
template <class T> struct Gradients {
  using A = accumulator_t<T>;
  const T* y;  // row n at y + n * stride_y
  int64_t stride_y;
  T* x;
  int64_t stride_x;
  A *weight, *bias;  // [E], to be added to
  A *cos, *sin;      // of the first vision token, to be added to, or null
};

// The gradients of cos and sin for one row: `grad` is the result's, `z` the row before it turned.
template <class A> void add_angles(const A* grad, const A* z, A* grad_cos, A* grad_sin, int64_t width) {
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
  A *sum_g_xhat = scratch.row(4), *sum_g = scratch.row(5);  // of these rows alone: long sums lose digits
  for (int64_t i = 0; i < width; ++i) sum_g_xhat[i] = sum_g[i] = 0;
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
      sum_g_xhat[i] += g[i] * xhat[i];
      sum_g[i] += g[i];
    }
    mean_d /= static_cast<A>(width);
    mean_d_xhat /= static_cast<A>(width);
    T* grad_x = grads.x + n * grads.stride_x;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(grad_x + i, rstd * (d[i] - mean_d - xhat[i] * mean_d_xhat));
  }
  for (int64_t i = 0; i < width; ++i) {
    grads.weight[i] += sum_g_xhat[i];
    grads.bias[i] += sum_g[i];
  }
}

#ifdef COGVX_ROW64

constexpr int kAhead = 2;  // heads; the rows of a chunk lie too far apart for the processor to foresee the next reads

template <class T> void fetch64(const T* x) {
  for (int i = 0; i < 64; i += 64 / sizeof(T)) _mm_prefetch(reinterpret_cast<const char*>(x + kAhead * 64 + i), _MM_HINT_T0);
}

template <bool kStream, bool kTurn, class T> void forward_rows64(const Span<T>& at, int64_t first, int64_t last, T* y) {
  const Row64 weight = load64(at.weight), bias = load64(at.bias);
  for (int64_t n = first; n < last; n += 4) {
    Row64 rows[4];
    int64_t each[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      each[r] = n + r < last ? n + r : last - 1;  // beyond the last row, the last row again
      const T* x = at.x + each[r] * at.stride;
      fetch64(x);
      rows[r] = load64(x);
    }
    normalize64(rows, at.eps);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) rows[r].v[i] = _mm512_fmadd_ps(rows[r].v[i], weight.v[i], bias.v[i]);
      if (kTurn) turn64(rows[r], at.cos + at.angle(each[r]), at.sin + at.angle(each[r]));
      store64<kStream>(y + (each[r] - at.first) * 64, rows[r]);
    }
  }
}

template <bool kStream, class T> void forward_rows64(const Span<T>& at, T* y) {
  const int64_t turning = !at.cos || at.num_text > at.last ? at.last : at.num_text < at.first ? at.first : at.num_text;
  forward_rows64<kStream, false>(at, at.first, turning, y);
  forward_rows64<kStream, true>(at, turning, at.last, y);
}

template <bool kStream, class T> void copy_rows64(const Span<T>& at, T* y) {
  for (int64_t n = at.first; n < at.last; ++n, y += 64) {
    fetch64(at.x + n * at.stride);
    copy64<kStream>(y, at.x + n * at.stride);
  }
}

template <class T> void backward_rows64(const Span<T>& at, const Gradients<T>& grads) {
  const Row64 weight = load64(at.weight), bias = load64(at.bias);
  Row64 sum_g_xhat{}, sum_g{};
  for (int64_t n = at.first; n < at.last; ++n) {
    const T *x = at.x + n * at.stride, *grad_y = grads.y + n * grads.stride_y;
    fetch64(x);
    Row64 xhat = load64(x), g = load64(grad_y);
    const float rstd = normalize64(xhat, at.eps);
    if (at.turns(n)) {
      if (grads.cos) {
        Row64 z = xhat;
        for (int i = 0; i < 4; ++i) z.v[i] = _mm512_fmadd_ps(z.v[i], weight.v[i], bias.v[i]);
        add_angles64(g, z, grads.cos + at.angle(n), grads.sin + at.angle(n));
      }
      turn_back64(g, at.cos + at.angle(n), at.sin + at.angle(n));
    }
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

#endif

template <class T> void forward_head(const Span<T>& at, int part, T* y, const Scratch<T>& scratch, bool stream) {
  (void)stream;
#ifdef COGVX_ROW64
  if constexpr (sizeof(T) <= sizeof(float)) {
    if (at.width == 64) {
      if (part == kV) return stream ? copy_rows64<true>(at, y) : copy_rows64<false>(at, y);
      return stream ? forward_rows64<true>(at, y) : forward_rows64<false>(at, y);
    }
  }
#endif
  if (part == kV)
    copy_rows(at.x + at.first * at.stride, at.stride, y, at.width, at.last - at.first, at.width);
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

template <class T> void backward_head(const Span<T>& at, int part, const Gradients<T>& grads, const Scratch<T>& scratch) {
  if (part == kV) {
    const int64_t n = at.first;
    copy_rows(grads.y + n * grads.stride_y, grads.stride_y, grads.x + n * grads.stride_x, grads.stride_x, at.last - n,
              at.width);
    return;
  }
#ifdef COGVX_ROW64
  if constexpr (sizeof(T) <= sizeof(float))
    if (at.width == 64) return backward_rows64(at, grads);
#endif
  at.width == 64 ? backward_rows<T, 64>(at, grads, scratch) : backward_rows<T, 0>(at, grads, scratch);
}

// The tokens first <= n < last of every sample, so that the gradients of their cos and sin are summed here alone.
template <class T> void backward_chunk(const Args& args, int64_t index, const Scratch<T>& scratch) {
  using A = accumulator_t<T>;
  const int64_t width = args.width, first = index * kChunk;
  const int64_t last = first + kChunk < args.num_rows ? first + kChunk : args.num_rows;
  A* partials = reinterpret_cast<A*>(args.partials) + index * 4 * width;
  for (int64_t i = 0; i < 4 * width; ++i) partials[i] = 0;
  A *grad_cos = reinterpret_cast<A*>(args.grad_cos), *grad_sin = reinterpret_cast<A*>(args.grad_sin);
  for (int64_t n = first; grad_cos && n < last; ++n)
    for (int64_t i = 0; n >= args.num_text && i < width; ++i)
      grad_cos[(n - args.num_text) * width + i] = grad_sin[(n - args.num_text) * width + i] = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    T* grad_qkv = reinterpret_cast<T*>(args.grad_qkv.data) + b * args.grad_qkv.stride_b;
    for (int part = 0; part < 3; ++part) {
      A* sums = part == kV ? nullptr : partials + part * 2 * width;
      for (int64_t a = 0; a < args.num_heads; ++a) {
        const Gradients<T> grads{row_of<T>(args.grad[part], b, a, 0), args.grad[part].stride_n,
                                 grad_qkv + (part * args.num_heads + a) * width, args.grad_qkv.stride_n,
                                 sums, sums + width, grad_cos, grad_sin};
        backward_head(span(args, scratch, part, b, a, first, last), part, grads, scratch);
      }
    }
  }
}

// Adds the chunks up in their order, for one of the four vectors that every chunk has sums for.
template <class T> void backward_vector(const Args& args, int64_t num_chunks, int vector) {
  using A = accumulator_t<T>;
  T* target = reinterpret_cast<T*>(vector % 2 ? args.grad_bias[vector / 2] : args.grad_weight[vector / 2]);
  for (int64_t i = 0; i < args.width; ++i) {
    const A* partial = reinterpret_cast<const A*>(args.partials) + vector * args.width + i;
    double sum = 0;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) sum += partial[chunk * 4 * args.width];
    store(target + i, static_cast<A>(sum));
  }
}

template <class T> void backward_as(const Args& args, int num_threads) {
  const int64_t num_chunks = (args.num_rows + kChunk - 1) / kChunk;
  (void)num_threads;
#pragma omp parallel num_threads(num_threads) if (num_chunks > 1)
  {
    const Scratch<T> scratch(args);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < num_chunks; ++index) backward_chunk(args, index, scratch);
    // Here the threads wait for one another.
#pragma omp for schedule(static)
    for (int vector = 0; vector < 4; ++vector) backward_vector<T>(args, num_chunks, vector);
  }
}

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
