// Compiled once for each instruction set (COGVX_ISA names it). No standard containers here: their code would be shared
// between the variants, and one compiled for a newer processor could be linked into all.
#include "expert_layernorm/expert_layernorm.h"

#include <math.h>

namespace cogvx::expert_layernorm::COGVX_ISA {
namespace {

inline float square_root(float value) { return sqrtf(value); }
inline double square_root(double value) { return sqrt(value); }

template <class T> const T* row_of(const Rows& rows, int64_t b, int64_t n) {
  return reinterpret_cast<const T*>(rows.data) + b * rows.stride_b + n * rows.stride_n;
}

template <class T> T* mutable_row_of(const Rows& rows, int64_t b, int64_t n) {
  return reinterpret_cast<T*>(rows.data) + b * rows.stride_b + n * rows.stride_n;
}

// Each thread's buffers: `count` rows in the arithmetic type.
template <class A> struct Scratch {
  A* data;
  int64_t width;
  Scratch(int64_t count, int64_t row_width) : data(new A[count * row_width]), width(row_width) {}
  ~Scratch() { delete[] data; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* row(int64_t i) const { return data + i * width; }
};

// The row in the arithmetic type: itself where it is so already, else a copy in `buffer`.
template <class T> const accumulator_t<T>* widen_row(const T* row, accumulator_t<T>* buffer, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) buffer[i] = widen(row[i]);
  return buffer;
}
inline const float* widen_row(const float* row, float*, int64_t) { return row; }
inline const double* widen_row(const double* row, double*, int64_t) { return row; }

template <class A> struct Moments {
  A mean, rstd;
};

// Two passes: the variance of the differences is accurate also where the mean is large.
template <class A> Moments<A> moments(const A* row, int64_t width, double eps) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += row[i];
  const A mean = sum / static_cast<A>(width);
  A squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) squares += (row[i] - mean) * (row[i] - mean);
  return {mean, 1 / square_root(squares / static_cast<A>(width) + static_cast<A>(eps))};
}

template <class T> void forward_chunk(const Args& args, const Chunk& chunk, const Scratch<accumulator_t<T>>& scratch) {
  using A = accumulator_t<T>;
  const T *weight = reinterpret_cast<const T*>(args.weight), *bias = reinterpret_cast<const T*>(args.bias);
  const T *shift = row_of<T>(args.shift, chunk.b, chunk.m), *scale = row_of<T>(args.scale, chunk.b, chunk.m);
  A *factor = scratch.row(0), *offset = scratch.row(1);  // y = xhat * factor + offset
#pragma omp simd
  for (int64_t i = 0; i < args.width; ++i) {
    const A modulation = 1 + widen(scale[i]);
    factor[i] = widen(weight[i]) * modulation;
    offset[i] = widen(bias[i]) * modulation + widen(shift[i]);
  }
  for (int64_t n = chunk.first; n < chunk.last; ++n) {
    const A* x = widen_row(row_of<T>(args.x, chunk.b, n), scratch.row(2), args.width);
    const Moments<A> of_x = moments(x, args.width, args.eps);
    T* y = mutable_row_of<T>(args.y, chunk.b, n);
#pragma omp simd
    for (int64_t i = 0; i < args.width; ++i) store(y + i, (x[i] - of_x.mean) * of_x.rstd * factor[i] + offset[i]);
  }
}

// With xhat = (x - mean) * rstd and d = grad * weight * (1 + scale):
// grad_x = rstd * (d - mean(d) - xhat * mean(d * xhat)).
template <class T>
void backward_row(const Args& args, const Chunk& chunk, int64_t n, const Scratch<accumulator_t<T>>& scratch,
                  accumulator_t<T>* sum_grad, accumulator_t<T>* sum_grad_xhat) {
  using A = accumulator_t<T>;
  const int64_t width = args.width;
  const A* factor = scratch.row(0);
  const A* x = widen_row(row_of<T>(args.x, chunk.b, n), scratch.row(1), width);
  const A* grad = widen_row(row_of<T>(args.grad, chunk.b, n), scratch.row(2), width);
  const Moments<A> of_x = moments(x, width, args.eps);
  // d is kept: a product fused into one sum and not into another leaves a difference where there is none.
  A *d = scratch.row(3), mean_d = 0, mean_d_xhat = 0;
#pragma omp simd reduction(+ : mean_d, mean_d_xhat)
  for (int64_t i = 0; i < width; ++i) {
    const A xhat = (x[i] - of_x.mean) * of_x.rstd;
    d[i] = grad[i] * factor[i];
    mean_d += d[i];
    mean_d_xhat += d[i] * xhat;
    sum_grad[i] += grad[i];
    sum_grad_xhat[i] += grad[i] * xhat;
  }
  mean_d /= static_cast<A>(width);
  mean_d_xhat /= static_cast<A>(width);
  T* grad_x = mutable_row_of<T>(args.grad_x, chunk.b, n);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i)
    store(grad_x + i, of_x.rstd * (d[i] - mean_d - (x[i] - of_x.mean) * of_x.rstd * mean_d_xhat));
}

template <class T>
void backward_chunk(const Args& args, const Chunk& chunk, int64_t index, const Scratch<accumulator_t<T>>& scratch) {
  using A = accumulator_t<T>;
  const T *weight = reinterpret_cast<const T*>(args.weight), *scale = row_of<T>(args.scale, chunk.b, chunk.m);
  A* factor = scratch.row(0);
#pragma omp simd
  for (int64_t i = 0; i < args.width; ++i) factor[i] = widen(weight[i]) * (1 + widen(scale[i]));
  A* sum_grad = reinterpret_cast<A*>(args.partials) + index * 2 * args.width;
  A* sum_grad_xhat = sum_grad + args.width;
  for (int64_t i = 0; i < 2 * args.width; ++i) sum_grad[i] = 0;
  for (int64_t n = chunk.first; n < chunk.last; ++n)
    backward_row<T>(args, chunk, n, scratch, sum_grad, sum_grad_xhat);
}

// Adds the chunks up in their order, column by column, for columns first <= i < last.
template <class T> void backward_columns(const Args& args, int64_t first, int64_t last) {
  using A = accumulator_t<T>;
  const T *weight = reinterpret_cast<const T*>(args.weight), *bias = reinterpret_cast<const T*>(args.bias);
  const int64_t per_sample = num_chunks(args, kChunk), num_text_chunks = num_chunks(args.num_text, kChunk);
  for (int64_t i = first; i < last; ++i) {
    double grad_weight = 0, grad_bias = 0;
    for (int64_t b = 0; b < args.batch; ++b) {
      for (int m = 0; m < 2; ++m) {
        double sum_grad = 0, sum_grad_xhat = 0;
        for (int64_t c = m ? num_text_chunks : 0; c < (m ? per_sample : num_text_chunks); ++c) {
          const A* partial = reinterpret_cast<const A*>(args.partials) + (b * per_sample + c) * 2 * args.width + i;
          sum_grad += partial[0];
          sum_grad_xhat += partial[args.width];
        }
        const double modulation = 1 + static_cast<double>(widen(row_of<T>(args.scale, b, m)[i]));
        grad_weight += sum_grad_xhat * modulation;
        grad_bias += sum_grad * modulation;
        const double grad_scale = sum_grad_xhat * widen(weight[i]) + sum_grad * widen(bias[i]);
        store(mutable_row_of<T>(args.grad_shift, b, m) + i, static_cast<A>(sum_grad));
        store(mutable_row_of<T>(args.grad_scale, b, m) + i, static_cast<A>(grad_scale));
      }
    }
    store(reinterpret_cast<T*>(args.grad_weight) + i, static_cast<A>(grad_weight));
    store(reinterpret_cast<T*>(args.grad_bias) + i, static_cast<A>(grad_bias));
  }
}

template <class T> void forward_as(const Args& args, int num_threads) {
  const int64_t total = args.batch * num_chunks(args, kChunk);
  (void)num_threads;  // unused without OpenMP
#pragma omp parallel num_threads(num_threads) if (total > 1)
  {
    const Scratch<accumulator_t<T>> scratch(3, args.width);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < total; ++index) forward_chunk<T>(args, chunk_at(args, index, kChunk), scratch);
  }
}

template <class T> void backward_as(const Args& args, int num_threads) {
  constexpr int64_t kColumns = 64;  // a cache line or more of every partial row
  const int64_t total = args.batch * num_chunks(args, kChunk);
  const int64_t num_column_blocks = (args.width + kColumns - 1) / kColumns;
  (void)num_threads;
#pragma omp parallel num_threads(num_threads) if (total > 1)
  {
    const Scratch<accumulator_t<T>> scratch(4, args.width);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < total; ++index)
      backward_chunk<T>(args, chunk_at(args, index, kChunk), index, scratch);
    // Here the threads wait for one another.
#pragma omp for schedule(static)
    for (int64_t block = 0; block < num_column_blocks; ++block) {
      const int64_t last = (block + 1) * kColumns;
      backward_columns<T>(args, block * kColumns, last < args.width ? last : args.width);
    }
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

}  // namespace cogvx::expert_layernorm::COGVX_ISA
