// Compiled once for each instruction set (COGVX_ISA names it); no standard containers here, see expert_layernorm.
#include "gated_expert_layernorm/gated_expert_layernorm.h"

#include "expert_layernorm/rows.h"

namespace cogvx::gated_expert_layernorm::COGVX_ISA {
namespace {

using namespace cogvx::expert_layernorm;

using Args = gated_expert_layernorm::Args;
using Norm = expert_layernorm::Args;

template <class T> bool is_large(const Norm& norm) {
  return norm.batch * norm.num_rows * norm.width * static_cast<int64_t>(sizeof(T)) > kStreamedBytes;
}

// x + gate y, rounded as it is stored and widened again. `y` is left as it was.
template <class T>
const T* add_gated(const accumulator_t<T>* y, const accumulator_t<T>* gate, int64_t width, accumulator_t<T>* x,
                   accumulator_t<T>* rounded) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) x[i] += gate[i] * y[i];
  T* stored = reinterpret_cast<T*>(rounded);
  round_row(stored, x, width);
  load_row(x, stored, width);
  return stored;
}

template <class T>
void forward_chunk(const Args& args, const Chunk& chunk, const Scratch<accumulator_t<T>>& scratch, bool streamed) {
  using A = accumulator_t<T>;
  const Norm& norm = args.norm;
  const int64_t width = norm.width;
  A *factor = scratch.row(0), *offset = scratch.row(1), *gate = scratch.row(2);
  A *x = scratch.row(3), *y = scratch.row(4), *rounded = scratch.row(5);
  load_modulation<T>(norm, chunk, factor, offset);
  load_row(gate, row_of<T>(args.gate, chunk.b, chunk.m), width);
  for (int64_t n = chunk.first; n < chunk.last; ++n) {
    load_row(x, row_of<T>(args.x, chunk.b, n), width);
    load_row(y, row_of<T>(args.y, chunk.b, n), width);
    prefetch_row(row_of<T>(args.x, chunk.b, n + 1), width);
    prefetch_row(row_of<T>(args.y, chunk.b, n + 1), width);
    copy_row(mutable_row_of<T>(args.x_new, chunk.b, n), add_gated<T>(y, gate, width, x, rounded), width, streamed);
    normalize_row(x, factor, offset, norm, y);
    write_row(mutable_row_of<T>(norm.y, chunk.b, n), y, width, streamed, rounded);
  }
}

// With g the gradient of x_new, through the norm too: grad_x = g, grad_y = gate g, and the chunk's sum of g y.
template <class T>
void backward_chunk(const Args& args, const Chunk& chunk, int64_t index, const Scratch<accumulator_t<T>>& scratch,
                    bool streamed) {
  using A = accumulator_t<T>;
  const Norm& norm = args.norm;
  const int64_t width = norm.width;
  A *factor = scratch.row(0), *gate = scratch.row(1), *x = scratch.row(2), *y = scratch.row(3);
  A *grad = scratch.row(4), *rounded = scratch.row(5);
  load_factor<T>(norm, chunk, factor);
  load_row(gate, row_of<T>(args.gate, chunk.b, chunk.m), width);
  const Sums<A> sums(norm, index);
  A* sum_gate = reinterpret_cast<A*>(args.gate_partials) + index * width;
  for (int64_t i = 0; i < width; ++i) sum_gate[i] = 0;
  for (int64_t n = chunk.first; n < chunk.last; ++n) {
    load_row(x, row_of<T>(args.x, chunk.b, n), width);
    load_row(y, row_of<T>(args.y, chunk.b, n), width);
    load_row(grad, row_of<T>(norm.grad, chunk.b, n), width);
    add_gated<T>(y, gate, width, x, rounded);
    backward_row(x, factor, norm, sums, grad);
    const T* grad_x_new = row_of<T>(args.grad_x_new, chunk.b, n);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      grad[i] += widen(grad_x_new[i]);
      sum_gate[i] += grad[i] * y[i];
      y[i] = grad[i] * gate[i];
    }
    write_row(mutable_row_of<T>(norm.grad_x, chunk.b, n), grad, width, streamed, rounded);
    write_row(mutable_row_of<T>(args.grad_y, chunk.b, n), y, width, streamed, rounded);
  }
}

template <class T> void gate_columns(const Args& args, int64_t first, int64_t last) {
  using A = accumulator_t<T>;
  const A* partials = reinterpret_cast<const A*>(args.gate_partials);
  for (int64_t b = 0; b < args.norm.batch; ++b)
    for (int m = 0; m < 2; ++m)
      for (int64_t i = first; i < last; ++i)
        store(mutable_row_of<T>(args.grad_gate, b, m) + i,
              static_cast<A>(sum_of_chunks(args.norm, b, m, partials + i, args.norm.width)));
}

template <class T> void forward_as(const Args& args, int num_threads) {
  const int64_t total = args.norm.batch * num_chunks(args.norm, kChunk);
  const bool streamed = is_large<T>(args.norm);
  (void)num_threads;  // unused without OpenMP
#pragma omp parallel num_threads(num_threads) if (total > 1)
  {
    const Scratch<accumulator_t<T>> scratch(6, args.norm.width);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < total; ++index)
      forward_chunk<T>(args, chunk_at(args.norm, index, kChunk), scratch, streamed);
    finish_streaming();
  }
}

template <class T> void backward_as(const Args& args, int num_threads) {
  const int64_t width = args.norm.width, total = args.norm.batch * num_chunks(args.norm, kChunk);
  const int64_t num_column_blocks = (width + kColumns - 1) / kColumns;
  const bool streamed = is_large<T>(args.norm);
  (void)num_threads;
#pragma omp parallel num_threads(num_threads) if (total > 1)
  {
    const Scratch<accumulator_t<T>> scratch(6, width);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < total; ++index)
      backward_chunk<T>(args, chunk_at(args.norm, index, kChunk), index, scratch, streamed);
    // Here the threads wait for one another.
#pragma omp for schedule(static)
    for (int64_t block = 0; block < num_column_blocks; ++block) {
      const int64_t first = block * kColumns, last = first + kColumns < width ? first + kColumns : width;
      backward_columns<T>(args.norm, first, last);
      gate_columns<T>(args, first, last);
    }
    finish_streaming();
  }
}

}  // namespace

void forward(const Args& args, int num_threads) {
  switch (args.norm.dtype) {
    case DType::float32: return forward_as<float>(args, num_threads);
    case DType::float16: return forward_as<Half>(args, num_threads);
    case DType::bfloat16: return forward_as<BFloat16>(args, num_threads);
    case DType::float64: return forward_as<double>(args, num_threads);
  }
}

void backward(const Args& args, int num_threads) {
  switch (args.norm.dtype) {
    case DType::float32: return backward_as<float>(args, num_threads);
    case DType::float16: return backward_as<Half>(args, num_threads);
    case DType::bfloat16: return backward_as<BFloat16>(args, num_threads);
    case DType::float64: return backward_as<double>(args, num_threads);
  }
}

}  // namespace cogvx::gated_expert_layernorm::COGVX_ISA
