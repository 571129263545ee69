#include "expert_layernorm/rows.cuh"

namespace cogvx::expert_layernorm {
namespace {

template <class T, class Layout> __global__ void __launch_bounds__(Layout::kMaxThreads, 1) forward_kernel(Args args) {
  using Row = Values<Layout::kVec, Layout::kSlots>;
  BlockSum block_sum(*reinterpret_cast<BlockSum::Shared*>(shared_memory()));
  const int width = static_cast<int>(args.width);
  const Chunk chunk = chunk_at(args, blockIdx.x, kForwardChunk);

  Row factor, offset, x;
  typename Row::template Packed<T> next;
  next.load(row_of<T>(args.x, chunk.b, chunk.first), width);
  load_modulation<T>(args, chunk, factor, offset);
  for (int64_t n = chunk.first; n < chunk.last; ++n) {
    x.unpack(next);
    if (n + 1 < chunk.last) next.load(row_of<T>(args.x, chunk.b, n + 1), width);
    normalize(x, factor, offset, args, block_sum);
    x.store(row_of<T>(args.y, chunk.b, n), width);
  }
}

template <class T, class Layout> __global__ void __launch_bounds__(Layout::kMaxThreads, 1) backward_kernel(Args args) {
  using Row = Values<Layout::kVec, Layout::kSlots>;
  BlockSum block_sum(*reinterpret_cast<BlockSum::Shared*>(shared_memory()));
  const int width = static_cast<int>(args.width);
  const Chunk chunk = chunk_at(args, blockIdx.x, kChunk);

  Gradients<Row> gradients;
  Row x, grad;
  typename Row::template Packed<T> next_x, next_grad;
  next_x.load(row_of<T>(args.x, chunk.b, chunk.first), width);
  next_grad.load(row_of<T>(args.grad, chunk.b, chunk.first), width);
  gradients.template load<T>(args, chunk);
  for (int64_t n = chunk.first; n < chunk.last; ++n) {
    x.unpack(next_x);
    grad.unpack(next_grad);
    if (n + 1 < chunk.last) {
      next_x.load(row_of<T>(args.x, chunk.b, n + 1), width);
      next_grad.load(row_of<T>(args.grad, chunk.b, n + 1), width);
    }
    gradients.add_row(x, grad, args, block_sum);
    x.store(row_of<T>(args.grad_x, chunk.b, n), width);
  }
  gradients.store(args);
}

template <class T> __global__ void __launch_bounds__(kSumColumns* kSumRows) columns_kernel(Args args) {
  finish_columns<T>(args, *reinterpret_cast<ColumnSums<2>*>(shared_memory()));
}

template <class T, class Layout> const char* launch_forward(const Args& args, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(args.batch * num_chunks(args, kForwardChunk));
  if (!blocks) return nullptr;
  return launch<forward_kernel<T, Layout>>(blocks, num_threads<Layout>(args), sizeof(BlockSum::Shared), stream, args);
}

template <class T, class Layout> const char* launch_backward(const Args& args, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(args.batch * num_chunks(args, kChunk));
  if (blocks) {
    const char* error = launch<backward_kernel<T, Layout>>(blocks, num_threads<Layout>(args), sizeof(BlockSum::Shared),
                                                           stream, args);
    if (error) return error;
  }
  return launch<columns_kernel<T>>(num_column_blocks(args), dim3(kSumColumns, kSumRows), sizeof(ColumnSums<2>), stream,
                                   args);
}

template <class T> const char* forward_as(const Args& args, cudaStream_t stream) {
  if (is_aligned<T>(args)) return launch_forward<T, Vectors<T>>(args, stream);
  return launch_forward<T, Scalars<T>>(args, stream);
}

template <class T> const char* backward_as(const Args& args, cudaStream_t stream) {
  if (is_aligned<T>(args)) return launch_backward<T, Vectors<T>>(args, stream);
  return launch_backward<T, Scalars<T>>(args, stream);
}

}  // namespace

const char* forward_cuda(const Args& args, int device, uintptr_t stream_address) {
  if (const char* reason = why_not(args)) return reason;
  return by_dtype(args.dtype, device, stream_address, [&](auto zero, cudaStream_t stream) {
    return forward_as<decltype(zero)>(args, stream);
  });
}

const char* backward_cuda(const Args& args, int device, uintptr_t stream_address) {
  if (const char* reason = why_not(args)) return reason;
  return by_dtype(args.dtype, device, stream_address, [&](auto zero, cudaStream_t stream) {
    return backward_as<decltype(zero)>(args, stream);
  });
}

}  // namespace cogvx::expert_layernorm
