// Compiled once for each instruction set (COGVX_ISA names it). No standard containers here: their code would be shared
// between the variants, and one compiled for a newer processor could be linked into all.
#include "expert_layernorm/rows.h"

namespace cogvx::expert_layernorm::COGVX_ISA {
namespace {

template <class T, class A>
void forward_chunk(const Args& args, const Chunk& chunk, const Scratch<A>& scratch, bool streamed) {
  A *factor = scratch.row(0), *offset = scratch.row(1), *x = scratch.row(2), *y = scratch.row(3);
  load_modulation<T>(args, chunk, factor, offset);
  for (int64_t n = chunk.first; n < chunk.last; ++n) {
    load_row(x, row_of<T>(args.x, chunk.b, n), args.width);
    prefetch_row(row_of<T>(args.x, chunk.b, n + 1), args.width);
    normalize_row(x, factor, offset, args, mutable_row_of<T>(args.y, chunk.b, n), streamed, y);
  }
}

template <class T, class A>
void backward_chunk(const Args& args, const Chunk& chunk, int64_t index, const Scratch<A>& scratch,
                    bool streamed) {
  A *factor = scratch.row(0), *x = scratch.row(1), *grad = scratch.row(2);
  load_factor<T>(args, chunk, factor);
  const Sums<A> sums(args, index);
  for (int64_t n = chunk.first; n < chunk.last; ++n) {
    load_row(x, row_of<T>(args.x, chunk.b, n), args.width);
    load_row(grad, row_of<T>(args.grad, chunk.b, n), args.width);
    prefetch_row(row_of<T>(args.x, chunk.b, n + 1), args.width);
    prefetch_row(row_of<T>(args.grad, chunk.b, n + 1), args.width);
    backward_row(x, factor, args, sums, grad);
    write_row(mutable_row_of<T>(args.grad_x, chunk.b, n), grad, args.width, streamed, x);
  }
}

template <class T, class A> void forward_as(const Args& args, int num_threads) {
  const int64_t total = args.batch * num_chunks(args, kChunk);
  const bool streamed = is_streamed<T>(args.y, args.batch, args.num_rows, args.width);
  (void)num_threads;  // unused without OpenMP
#pragma omp parallel num_threads(num_threads) if (total > 1)
  {
    const Scratch<A> scratch(4, args.width);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < total; ++index)
      forward_chunk<T>(args, chunk_at(args, index, kChunk), scratch, streamed);
    finish_streaming();
  }
}

template <class T, class A> void backward_as(const Args& args, int num_threads) {
  const int64_t total = args.batch * num_chunks(args, kChunk);
  const int64_t num_column_blocks = (args.width + kColumns - 1) / kColumns;
  const bool streamed = is_streamed<T>(args.grad_x, args.batch, args.num_rows, args.width);
  (void)num_threads;
#pragma omp parallel num_threads(num_threads) if (total > 1)
  {
    const Scratch<A> scratch(3, args.width);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < total; ++index)
      backward_chunk<T>(args, chunk_at(args, index, kChunk), index, scratch, streamed);
    // Here the threads wait for one another.
#pragma omp for schedule(static)
    for (int64_t block = 0; block < num_column_blocks; ++block) {
      const int64_t last = (block + 1) * kColumns;
      backward_columns<T, A>(args, block * kColumns, last < args.width ? last : args.width);
    }
    finish_streaming();
  }
}

}  // namespace

void forward(const Args& args, int num_threads) {
  with_types(args, [&](auto types) {
    forward_as<typename decltype(types)::Element, typename decltype(types)::Arithmetic>(args, num_threads);
  });
}

void backward(const Args& args, int num_threads) {
  with_types(args, [&](auto types) {
    backward_as<typename decltype(types)::Element, typename decltype(types)::Arithmetic>(args, num_threads);
  });
}

}  // namespace cogvx::expert_layernorm::COGVX_ISA
