// What expert_layernorm does with a row on a GPU, for its own kernel and for the one that adds a gated row first.
//
// A block takes a chunk of rows that share a modulation, keeps that in registers, and reads and writes each row once;
// the next row is on its way while sums of this one wait for one another.
#pragma once

#include "common/by_dtype.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "expert_layernorm/expert_layernorm.h"

namespace cogvx::expert_layernorm {
namespace {

constexpr int kForwardChunk = 8;  // enough rows to share the modulation, few enough to fill a GPU
constexpr int kMaxWidth = 4096;

// Rows are read in vectors of 16 bytes where all are aligned to that, else value by value.
template <class T> struct Vectors {  // at most 4096 / 16 threads, so that the backward pass has registers enough
  static constexpr int kVec = 16 / sizeof(T), kSlots = 2, kMaxThreads = kMaxWidth / (kVec * kSlots);
};
template <class T> struct Scalars {
  static constexpr int kVec = 1, kSlots = 8, kMaxThreads = kMaxWidth / (kVec * kSlots);
};

template <class T> __device__ T* row_of(const Rows& rows, int64_t b, int64_t n) {
  return reinterpret_cast<T*>(rows.data) + b * rows.stride_b + n * rows.stride_n;
}

// The norm's affine and its modulation in one: y = xhat * factor + offset.
template <class T, class Row>
__device__ void load_modulation(const Args& args, const Chunk& chunk, Row& factor, Row& offset) {
  const int width = static_cast<int>(args.width);
  Row scale, shift;
  scale.load(row_of<T>(args.scale, chunk.b, chunk.m), width);
  shift.load(row_of<T>(args.shift, chunk.b, chunk.m), width);
  factor.load(reinterpret_cast<const T*>(args.weight), width);
  offset.load(reinterpret_cast<const T*>(args.bias), width);
  factor.set(width, [](float w, float s) { return w * (1.0f + s); }, factor, scale);
  offset.set(width, [](float b, float s, float t) { return b * (1.0f + s) + t; }, offset, scale, shift);
}

// x becomes x - mean; returns 1 / sqrt(variance + eps). Two passes: the variance of the differences is accurate also
// where the mean is large.
template <class Row> __device__ float center(Row& x, const Args& args, BlockSum& block_sum) {
  const int width = static_cast<int>(args.width);
  const float mean = block_sum(x.sum([](float v) { return v; })) / width;
  x.set(width, [mean](float v) { return v - mean; }, x);
  const float variance = block_sum(x.sum([](float v) { return v * v; })) / width;
  return 1.0f / sqrtf(variance + static_cast<float>(args.eps));
}

// x becomes its norm.
template <class Row>
__device__ void normalize(Row& x, const Row& factor, const Row& offset, const Args& args, BlockSum& block_sum) {
  const int width = static_cast<int>(args.width);
  const float rstd = center(x, args, block_sum);
  x.set(width, [rstd](float v, float f, float o) { return v * rstd * f + o; }, x, factor, offset);
}

// The backward pass over a chunk's rows: the factor of d = grad * weight * (1 + scale), and the sums over the rows.
template <class Row> struct Gradients {
  Row factor, sum_grad, sum_grad_xhat;

  template <class T> __device__ void load(const Args& args, const Chunk& chunk) {
    const int width = static_cast<int>(args.width);
    Row scale;
    scale.load(row_of<T>(args.scale, chunk.b, chunk.m), width);
    factor.load(reinterpret_cast<const T*>(args.weight), width);
    factor.set(width, [](float w, float s) { return w * (1.0f + s); }, factor, scale);
    sum_grad.set(width, [] { return 0.0f; });
    sum_grad_xhat.set(width, [] { return 0.0f; });
  }

  // With xhat = (x - mean) * rstd: x becomes rstd * (d - mean(d) - xhat * mean(d * xhat)), and grad becomes d.
  __device__ void add_row(Row& x, Row& grad, const Args& args, BlockSum& block_sum) {
    const int width = static_cast<int>(args.width);
    const float rstd = center(x, args, block_sum);
    x.set(width, [rstd](float v) { return v * rstd; }, x);  // xhat
    sum_grad.set(width, [](float total, float g) { return total + g; }, sum_grad, grad);
    sum_grad_xhat.set(width, [](float total, float g, float h) { return total + g * h; }, sum_grad_xhat, grad, x);
    // d, never fused into a sum: rounded in one place and not in another, it leaves a difference where there is none.
    grad.set(width, [](float g, float f) { return __fmul_rn(g, f); }, grad, factor);
    float means[2] = {grad.sum([](float d) { return d; }), grad.sum([](float d, float h) { return d * h; }, x)};
    block_sum(means);
    const float mean_d = means[0] / width, mean_d_xhat = means[1] / width;
    x.set(width, [=](float h, float d) { return rstd * (d - mean_d - h * mean_d_xhat); }, x, grad);
  }

  __device__ void store(const Args& args) const {
    const int width = static_cast<int>(args.width);
    float* partial = reinterpret_cast<float*>(args.partials) + blockIdx.x * 2 * args.width;
    sum_grad.store(partial, width);
    sum_grad_xhat.store(partial + width, width);
  }
};

// A block adds the chunks up for some columns: one thread of a warp a column, in an order that depends on their number
// alone.
constexpr int kSumColumns = 32, kSumRows = 32;

template <int kCount> using ColumnSums = double[kCount][kSumRows][kSumColumns];

// For sample b and expert m: totals[k] = the sum over the chunks of partials[chunk][k][i], where threadIdx.y is 0. Rows
// of `partials` are args.width wide. The threads of a block call it together.
template <int kCount>
__device__ void add_chunks(const Args& args, int64_t b, int m, const float* partials, int64_t i,
                           ColumnSums<kCount>& shared, double (&totals)[kCount]) {
  const int64_t per_sample = num_chunks(args, kChunk), num_text_chunks = num_chunks(args.num_text, kChunk);
  const int64_t end = m ? per_sample : num_text_chunks;
  for (int k = 0; k < kCount; ++k) totals[k] = 0;
  for (int64_t c = (m ? num_text_chunks : 0) + threadIdx.y; c < end && i < args.width; c += kSumRows)
    for (int k = 0; k < kCount; ++k) totals[k] += partials[((b * per_sample + c) * kCount + k) * args.width + i];
  for (int k = 0; k < kCount; ++k) shared[k][threadIdx.y][threadIdx.x] = totals[k];
  __syncthreads();
  for (int k = 0; k < kCount && threadIdx.y == 0; ++k)
    for (int y = 1; y < kSumRows; ++y) totals[k] += shared[k][y][threadIdx.x];
  __syncthreads();
}

// The gradients of weight, bias, shift and scale in this block's columns.
template <class T> __device__ void finish_columns(const Args& args, ColumnSums<2>& shared) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  const bool writes = threadIdx.y == 0 && i < args.width;
  double grad_weight = 0, grad_bias = 0, sums[2];  // of grad, of grad * xhat
  for (int64_t b = 0; b < args.batch; ++b) {
    for (int m = 0; m < 2; ++m) {
      add_chunks(args, b, m, reinterpret_cast<const float*>(args.partials), i, shared, sums);
      if (!writes) continue;
      const double modulation = 1.0 + to_accumulator(row_of<T>(args.scale, b, m)[i]);
      const double weight = to_accumulator(reinterpret_cast<const T*>(args.weight)[i]);
      const double bias = to_accumulator(reinterpret_cast<const T*>(args.bias)[i]);
      grad_weight += sums[1] * modulation;
      grad_bias += sums[0] * modulation;
      row_of<T>(args.grad_shift, b, m)[i] = from_accumulator<T>(static_cast<float>(sums[0]));
      row_of<T>(args.grad_scale, b, m)[i] =
          from_accumulator<T>(static_cast<float>(sums[1] * weight + sums[0] * bias));
    }
  }
  if (!writes) return;
  reinterpret_cast<T*>(args.grad_weight)[i] = from_accumulator<T>(static_cast<float>(grad_weight));
  reinterpret_cast<T*>(args.grad_bias)[i] = from_accumulator<T>(static_cast<float>(grad_bias));
}

inline unsigned num_column_blocks(const Args& args) {
  return static_cast<unsigned>((args.width + kSumColumns - 1) / kSumColumns);
}

template <class T> bool is_aligned(const Rows& rows) {
  constexpr int kVec = Vectors<T>::kVec;
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride_b % kVec == 0 && rows.stride_n % kVec == 0;
}

template <class T> bool is_aligned(const Args& args) {
  for (const char* row : {args.weight, args.bias, args.partials})
    if (reinterpret_cast<uintptr_t>(row) % 16) return false;
  return args.width % Vectors<T>::kVec == 0 && is_aligned<T>(args.x) && is_aligned<T>(args.shift) &&
         is_aligned<T>(args.scale) && is_aligned<T>(args.y) && is_aligned<T>(args.grad) && is_aligned<T>(args.grad_x);
}

template <class Layout> unsigned num_threads(const Args& args) {
  const int64_t values = Layout::kVec * Layout::kSlots * 32;  // of a warp
  return static_cast<unsigned>((args.width + values - 1) / values * 32);
}

inline const char* why_not(const Args& args) {
  return args.width < 1 || args.width > kMaxWidth ? "the width must be from 1 to 4096" : nullptr;
}

}  // namespace
}  // namespace cogvx::expert_layernorm
