// Compiled once for each instruction set (COGVX_ISA names it). No standard containers here: their code would be shared
// between the variants, and one compiled for a newer processor could be linked into all.
//
// A thread takes a chunk of tokens head by head: it reads a few rows of qkv side by side, and what it writes for a head
// is one piece of memory.
#include "qk_norm_rope/qk_norm_rope.h"
#include "qk_norm_rope/rows.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include "qk_norm_rope/rows64.h"
#define COGVX_ROWS64
#endif

namespace cogvx::qk_norm_rope::COGVX_ISA {
namespace {

constexpr int kV = 2;  // the index of v among q, k, v

template <class T> T* row_of(const Heads& heads, int64_t b, int64_t a, int64_t n) {
  return reinterpret_cast<T*>(heads.data) + b * heads.stride_b + a * heads.stride_a + n * heads.stride_n;
}

template <class T>
Span<T> span(const Args& args, const Scratch<T>& scratch, int part, int64_t b, int64_t a, int64_t first, int64_t last) {
  using A = accumulator_t<T>;
  const T* x = reinterpret_cast<const T*>(args.qkv.data) + b * args.qkv.stride_b;
  const bool normed = part != kV;
  return {first, last, args.num_text, args.width, static_cast<A>(args.eps),
          x + (part * args.num_heads + a) * args.width, args.qkv.stride_n,
          normed ? scratch.weight(part) : nullptr, normed ? scratch.bias(part) : nullptr,
          reinterpret_cast<const A*>(args.cos), reinterpret_cast<const A*>(args.sin), args.rounded};
}

template <class T> void forward_head(const Span<T>& at, int part, T* y, const Scratch<T>& scratch, bool stream) {
  (void)stream;
#ifdef COGVX_ROWS64
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
#ifdef COGVX_ROWS64
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
#ifdef COGVX_ROWS64
  if constexpr (sizeof(T) <= sizeof(float))
    if (at.width == 64 && !grads.cos) return backward_rows64(at, grads);
#endif
  at.width == 64 ? backward_rows<T, 64>(at, grads, scratch) : backward_rows<T, 0>(at, grads, scratch);
}

// The tokens first <= n < last of every sample, so that the gradients of their cos and sin are summed here alone.
template <class T> void backward_chunk(const Args& args, int64_t index, const Scratch<T>& scratch) {
  const int64_t width = args.width, first = index * kChunk;
  const int64_t last = first + kChunk < args.num_rows ? first + kChunk : args.num_rows;
  double* partials = args.partials + index * 4 * width;
  for (int64_t i = 0; i < 4 * width; ++i) partials[i] = 0;
  const int64_t first_angle = ((first > args.num_text ? first : args.num_text) - args.num_text) * width;
  double *grad_cos = reinterpret_cast<double*>(args.grad_cos), *grad_sin = reinterpret_cast<double*>(args.grad_sin);
  for (int64_t i = first_angle; grad_cos && i < (last - args.num_text) * width; ++i) grad_cos[i] = grad_sin[i] = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    T* grad_qkv = reinterpret_cast<T*>(args.grad_qkv.data) + b * args.grad_qkv.stride_b;
    for (int part = 0; part < 3; ++part) {
      double* sums = part == kV ? nullptr : partials + part * 2 * width;
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
  T* target = reinterpret_cast<T*>(vector % 2 ? args.grad_bias[vector / 2] : args.grad_weight[vector / 2]);
  for (int64_t i = 0; i < args.width; ++i) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk)
      sum += args.partials[(chunk * 4 + vector) * args.width + i];
    store(target + i, static_cast<accumulator_t<T>>(sum));
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
