// What expert_layernorm does with a row on a CPU, for its own kernel and for the one that adds a gated row first.
#pragma once

#include "common/row.h"
#include "expert_layernorm/expert_layernorm.h"

namespace cogvx::expert_layernorm {
namespace {

template <class T, class A> struct Types {
  using Element = T;
  using Arithmetic = A;
};

// f(Types of the tensors and of the arithmetic).
template <class F> void with_types(const Args& args, F f) {
  const bool narrow = args.width <= kNarrow;
  switch (args.dtype) {
    case DType::float32: return narrow ? f(Types<float, double>{}) : f(Types<float, float>{});
    case DType::float16: return narrow ? f(Types<Half, double>{}) : f(Types<Half, float>{});
    case DType::bfloat16: return narrow ? f(Types<BFloat16, double>{}) : f(Types<BFloat16, float>{});
    case DType::float64: return f(Types<double, double>{});
  }
}

// The norm's affine and its modulation in one: y = xhat * factor + offset.
template <class T, class A> void load_modulation(const Args& args, const Chunk& chunk, A* factor, A* offset) {
  const T *weight = reinterpret_cast<const T*>(args.weight), *bias = reinterpret_cast<const T*>(args.bias);
  const T *shift = row_of<T>(args.shift, chunk.b, chunk.m), *scale = row_of<T>(args.scale, chunk.b, chunk.m);
#pragma omp simd
  for (int64_t i = 0; i < args.width; ++i) {
    const A modulation = 1 + static_cast<A>(widen(scale[i]));
    factor[i] = widen(weight[i]) * modulation;
    offset[i] = widen(bias[i]) * modulation + widen(shift[i]);
  }
}

// Writes the norm of a row; `buffer` has room for it.
template <class T, class A>
void normalize_row(const A* x, const A* factor, const A* offset, const Args& args, T* y, bool streamed, A* buffer) {
  const auto [mean, rstd] = moments(x, args.width, args.eps);
#pragma omp simd
  for (int64_t i = 0; i < args.width; ++i) buffer[i] = (x[i] - mean) * rstd * factor[i] + offset[i];
  write_row(y, buffer, args.width, streamed, buffer);
}

#if defined(__AVX512BF16__)
inline void normalize_row(const float* x, const float* factor, const float* offset, const Args& args, BFloat16* y,
                          bool streamed, float*) {
  const Moments<float> of_x = moments(x, args.width, args.eps);
  const __m512 mean = _mm512_set1_ps(of_x.mean), rstd = _mm512_set1_ps(of_x.rstd);
  each16(args.width, [=](int64_t i, __mmask16 mask) {
    const __m512 xhat = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), mean), rstd);
    const __m512 of_i = _mm512_maskz_loadu_ps(mask, factor + i), to_i = _mm512_maskz_loadu_ps(mask, offset + i);
    write16(y + i, round16(_mm512_fmadd_ps(xhat, of_i, to_i)), mask, streamed);
  });
}
#endif

// The factor of the gradient: d = grad * weight * (1 + scale).
template <class T, class A> void load_factor(const Args& args, const Chunk& chunk, A* factor) {
  const T *weight = reinterpret_cast<const T*>(args.weight), *scale = row_of<T>(args.scale, chunk.b, chunk.m);
#pragma omp simd
  for (int64_t i = 0; i < args.width; ++i) factor[i] = widen(weight[i]) * (1 + static_cast<A>(widen(scale[i])));
}

// Where the sums of grad and of grad * xhat over the rows of a chunk go; set to 0.
template <class A> struct Sums {
  A *grad, *grad_xhat;
  Sums(const Args& args, int64_t index) : grad(reinterpret_cast<A*>(args.partials) + index * 2 * args.width) {
    grad_xhat = grad + args.width;
    for (int64_t i = 0; i < 2 * args.width; ++i) grad[i] = 0;
  }
};

// With xhat = (x - mean) * rstd: grad_x = rstd * (d - mean(d) - xhat * mean(d * xhat)). `grad` becomes grad_x.
template <class A> void backward_row(const A* x, const A* factor, const Args& args, const Sums<A>& sums, A* grad) {
  const int64_t width = args.width;
  const Moments<A> of_x = moments(x, width, args.eps);
  A *sum_grad = sums.grad, *sum_grad_xhat = sums.grad_xhat;
  // d is kept: a product fused into one sum and not into another leaves a difference where there is none.
  A *d = grad, mean_d = 0, mean_d_xhat = 0;
#pragma omp simd reduction(+ : mean_d, mean_d_xhat)
  for (int64_t i = 0; i < width; ++i) {
    const A xhat = (x[i] - of_x.mean) * of_x.rstd;
    sum_grad[i] += grad[i];
    sum_grad_xhat[i] += grad[i] * xhat;
    d[i] = grad[i] * factor[i];
    mean_d += d[i];
    mean_d_xhat += d[i] * xhat;
  }
  mean_d /= static_cast<A>(width);
  mean_d_xhat /= static_cast<A>(width);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i)
    grad[i] = of_x.rstd * (d[i] - mean_d - (x[i] - of_x.mean) * of_x.rstd * mean_d_xhat);
}

// The sum over the chunks of sample b and expert m, in their order, of `sums[chunk * stride]`.
template <class A> double sum_of_chunks(const Args& args, int64_t b, int m, const A* sums, int64_t stride) {
  const int64_t per_sample = num_chunks(args, kChunk), num_text_chunks = num_chunks(args.num_text, kChunk);
  double sum = 0;
  for (int64_t c = m ? num_text_chunks : 0; c < (m ? per_sample : num_text_chunks); ++c)
    sum += sums[(b * per_sample + c) * stride];
  return sum;
}

// Adds the chunks up, column by column, for columns first <= i < last.
template <class T, class A> void backward_columns(const Args& args, int64_t first, int64_t last) {
  const T *weight = reinterpret_cast<const T*>(args.weight), *bias = reinterpret_cast<const T*>(args.bias);
  const A* partials = reinterpret_cast<const A*>(args.partials);
  for (int64_t i = first; i < last; ++i) {
    double grad_weight = 0, grad_bias = 0;
    for (int64_t b = 0; b < args.batch; ++b) {
      for (int m = 0; m < 2; ++m) {
        const double sum_grad = sum_of_chunks(args, b, m, partials + i, 2 * args.width);
        const double sum_grad_xhat = sum_of_chunks(args, b, m, partials + args.width + i, 2 * args.width);
        const double modulation = 1 + static_cast<double>(widen(row_of<T>(args.scale, b, m)[i]));
        grad_weight += sum_grad_xhat * modulation;
        grad_bias += sum_grad * modulation;
        const double grad_scale = sum_grad_xhat * widen(weight[i]) + sum_grad * widen(bias[i]);
        store(mutable_row_of<T>(args.grad_shift, b, m) + i, static_cast<accumulator_t<T>>(sum_grad));
        store(mutable_row_of<T>(args.grad_scale, b, m) + i, static_cast<accumulator_t<T>>(grad_scale));
      }
    }
    store(reinterpret_cast<T*>(args.grad_weight) + i, static_cast<accumulator_t<T>>(grad_weight));
    store(reinterpret_cast<T*>(args.grad_bias) + i, static_cast<accumulator_t<T>>(grad_bias));
  }
}

}  // namespace
}  // namespace cogvx::expert_layernorm
