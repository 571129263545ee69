// Compiled once for each instruction set (COGVX_ISA names it); no standard containers here, see expert_layernorm.
#include "gated_expert_layernorm/gated_expert_layernorm.h"

#include "expert_layernorm/rows.h"

namespace cogvx::gated_expert_layernorm::COGVX_ISA {
namespace {

using namespace cogvx::expert_layernorm;

using Args = gated_expert_layernorm::Args;
using Norm = expert_layernorm::Args;

template <class T> bool is_streamed(const Rows& first, const Rows& second, const Norm& norm) {
  return cogvx::is_streamed<T>(first, norm.batch, norm.num_rows, norm.width) &&
         cogvx::is_streamed<T>(second, norm.batch, norm.num_rows, norm.width);
}

template <class T, class A> void add_gated(const T* x, const T* y, const A* gate, int64_t width, A* sum) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) sum[i] = widen(x[i]) + gate[i] * widen(y[i]);
}

// The same as it is stored in x_new: what it was rounded to, widened again.
template <class T, class A>
void write_gated(const T* x, const T* y, const A* gate, int64_t width, A* sum, T* x_new,
                 bool streamed, A* buffer) {
  T* stored = streamed ? reinterpret_cast<T*>(buffer) : x_new;
  add_gated(x, y, gate, width, sum);
  round_row(stored, sum, width);
  load_row(sum, stored, width);
  if (streamed) copy_row(x_new, stored, width, true);
}

#if defined(__AVX512BF16__)
inline void write_gated(const BFloat16* x, const BFloat16* y, const float* gate, int64_t width, float* sum,
                        BFloat16* x_new, bool streamed, float*) {
  each16(width, [=](int64_t i, __mmask16 mask) {
    const __m512 of_i = _mm512_maskz_loadu_ps(mask, gate + i);
    const __m256i stored = round16(_mm512_fmadd_ps(of_i, load16(y + i, mask), load16(x + i, mask)));
    write16(x_new + i, stored, mask, streamed);
    _mm512_mask_storeu_ps(sum + i, mask, widen16(stored));
  });
}
#endif

template <class T, class A>
void forward_chunk(const Args& args, const Chunk& chunk, const Scratch<A>& scratch, bool streamed) {
  const Norm& norm = args.norm;
  const int64_t width = norm.width, b = chunk.b;
  A *factor = scratch.row(0), *offset = scratch.row(1), *gate = scratch.row(2), *sum = scratch.row(3);
  A* buffer = scratch.row(4);
  load_modulation<T>(norm, chunk, factor, offset);
  load_row(gate, row_of<T>(args.gate, b, chunk.m), width);
  for (int64_t n = chunk.first; n < chunk.last; ++n) {
    const T *x = row_of<T>(args.x, b, n), *y = row_of<T>(args.y, b, n);
    write_gated(x, y, gate, width, sum, mutable_row_of<T>(args.x_new, b, n), streamed, buffer);
    prefetch_row(row_of<T>(args.x, b, n + 1), width);
    prefetch_row(row_of<T>(args.y, b, n + 1), width);
    normalize_row(sum, factor, offset, norm, mutable_row_of<T>(norm.y, b, n), streamed, buffer);
  }
}

// With g the gradient of x_new, through the norm too: grad_x = g, grad_y = gate g, and the chunk's sum of g y.
template <class T, class A>
void backward_chunk(const Args& args, const Chunk& chunk, int64_t index, const Scratch<A>& scratch,
                    bool streamed) {
  const Norm& norm = args.norm;
  const int64_t width = norm.width, b = chunk.b;
  A *factor = scratch.row(0), *gate = scratch.row(1), *sum = scratch.row(2), *grad = scratch.row(3);
  A* buffer = scratch.row(4);
  load_factor<T>(norm, chunk, factor);
  load_row(gate, row_of<T>(args.gate, b, chunk.m), width);
  const Sums<A> sums(norm, index);
  A* sum_gate = reinterpret_cast<A*>(args.gate_partials) + index * width;
  for (int64_t i = 0; i < width; ++i) sum_gate[i] = 0;
  for (int64_t n = chunk.first; n < chunk.last; ++n) {
    const T *x = row_of<T>(args.x, b, n), *y = row_of<T>(args.y, b, n), *grad_x_new = row_of<T>(args.grad_x_new, b, n);
    load_row(grad, row_of<T>(norm.grad, b, n), width);
    add_gated(x, y, gate, width, sum);
    for (const Rows* next : {&args.x, &args.y, &args.grad_x_new, &norm.grad})
      prefetch_row(row_of<T>(*next, b, n + 1), width);
    backward_row(sum, factor, norm, sums, grad);
    A* grad_y = sum;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      grad[i] += widen(grad_x_new[i]);
      sum_gate[i] += grad[i] * widen(y[i]);
      grad_y[i] = grad[i] * gate[i];
    }
    write_row(mutable_row_of<T>(norm.grad_x, b, n), grad, width, streamed, buffer);
    write_row(mutable_row_of<T>(args.grad_y, b, n), grad_y, width, streamed, buffer);
  }
}

template <class T, class A> void gate_columns(const Args& args, int64_t first, int64_t last) {
  const A* partials = reinterpret_cast<const A*>(args.gate_partials);
  for (int64_t b = 0; b < args.norm.batch; ++b)
    for (int m = 0; m < 2; ++m)
      for (int64_t i = first; i < last; ++i)
        store(mutable_row_of<T>(args.grad_gate, b, m) + i,
              static_cast<accumulator_t<T>>(sum_of_chunks(args.norm, b, m, partials + i, args.norm.width)));
}

template <class T, class A> void forward_as(const Args& args, int num_threads) {
  const int64_t total = args.norm.batch * num_chunks(args.norm, kChunk);
  const bool streamed = is_streamed<T>(args.x_new, args.norm.y, args.norm);
  (void)num_threads;  // unused without OpenMP
#pragma omp parallel num_threads(num_threads) if (total > 1)
  {
    const Scratch<A> scratch(5, args.norm.width);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < total; ++index)
      forward_chunk<T>(args, chunk_at(args.norm, index, kChunk), scratch, streamed);
    finish_streaming();
  }
}

template <class T, class A> void backward_as(const Args& args, int num_threads) {
  const int64_t width = args.norm.width, total = args.norm.batch * num_chunks(args.norm, kChunk);
  const int64_t num_column_blocks = (width + kColumns - 1) / kColumns;
  const bool streamed = is_streamed<T>(args.norm.grad_x, args.grad_y, args.norm);
  (void)num_threads;
#pragma omp parallel num_threads(num_threads) if (total > 1)
  {
    const Scratch<A> scratch(5, width);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < total; ++index)
      backward_chunk<T>(args, chunk_at(args.norm, index, kChunk), index, scratch, streamed);
    // Here the threads wait for one another.
#pragma omp for schedule(static)
    for (int64_t block = 0; block < num_column_blocks; ++block) {
      const int64_t first = block * kColumns, last = first + kColumns < width ? first + kColumns : width;
      backward_columns<T, A>(args.norm, first, last);
      gate_columns<T, A>(args, first, last);
    }
    finish_streaming();
  }
}

}  // namespace

void forward(const Args& args, int num_threads) {
  with_types(args.norm, [&](auto types) {
    forward_as<typename decltype(types)::Element, typename decltype(types)::Arithmetic>(args, num_threads);
  });
}

void backward(const Args& args, int num_threads) {
  with_types(args.norm, [&](auto types) {
    backward_as<typename decltype(types)::Element, typename decltype(types)::Arithmetic>(args, num_threads);
  });
}

}  // namespace cogvx::gated_expert_layernorm::COGVX_ISA
