#include "expert_layernorm/rows.cuh"
#include "gated_expert_layernorm/gated_expert_layernorm.h"

namespace cogvx::gated_expert_layernorm {
namespace {

using namespace cogvx::expert_layernorm;

using Args = gated_expert_layernorm::Args;
using Norm = expert_layernorm::Args;

// x becomes x + gate * y as it is stored: rounded.
template <class T, class Row> __device__ void add_gated(Row& x, const Row& y, const Row& gate, int width) {
  const auto rounded = [](float v, float w, float g) { return to_accumulator(from_accumulator<T>(v + g * w)); };
  x.set(width, rounded, x, y, gate);
}

template <class T, class Layout> __global__ void __launch_bounds__(Layout::kMaxThreads, 1) forward_kernel(Args args) {
  using Row = Values<Layout::kVec, Layout::kSlots>;
  constexpr bool kIsAhead = Layout::kVec > 1;  // single values take too many registers for that
  BlockSum block_sum(*reinterpret_cast<BlockSum::Shared*>(shared_memory()));
  const Norm& norm = args.norm;
  const int width = static_cast<int>(norm.width);
  const Chunk chunk = chunk_at(norm, blockIdx.x, kForwardChunk);

  Row factor, offset, gate, x, y;
  typename Row::template Packed<T> next_x, next_y;
  const auto load = [&](int64_t n) {
    next_x.load(row_of<T>(args.x, chunk.b, n), width);
    next_y.load(row_of<T>(args.y, chunk.b, n), width);
  };
  load(chunk.first);
  load_modulation<T>(norm, chunk, factor, offset);
  gate.load(row_of<T>(args.gate, chunk.b, chunk.m), width);
  for (int64_t n = chunk.first; n < chunk.last; ++n) {
    if (!kIsAhead) load(n);
    x.unpack(next_x);
    y.unpack(next_y);
    if (kIsAhead && n + 1 < chunk.last) load(n + 1);
    add_gated<T>(x, y, gate, width);
    x.store(row_of<T>(args.x_new, chunk.b, n), width);
    normalize(x, factor, offset, norm, block_sum);
    x.store(row_of<T>(norm.y, chunk.b, n), width);
  }
}

// With g the gradient of x_new, through the norm too: grad_x = g, grad_y = gate g, and the chunk's sum of g y. Single
// values take more registers than vectors: what is not needed for the norm is then read again behind it.
template <class T, class Layout> __global__ void __launch_bounds__(Layout::kMaxThreads, 1) backward_kernel(Args args) {
  using Row = Values<Layout::kVec, Layout::kSlots>;
  constexpr bool kKeeps = Layout::kVec > 1;
  BlockSum block_sum(*reinterpret_cast<BlockSum::Shared*>(shared_memory()));
  const Norm& norm = args.norm;
  const int width = static_cast<int>(norm.width);
  const Chunk chunk = chunk_at(norm, blockIdx.x, kChunk);
  const T* gate_row = row_of<T>(args.gate, chunk.b, chunk.m);
  float* gate_partial = reinterpret_cast<float*>(args.gate_partials) + blockIdx.x * norm.width;

  Gradients<Row> gradients;
  Row gate, sum_gate, x, grad, y;
  typename Row::template Packed<T> next_x, next_y, next_grad, this_y, grad_x_new;
  const auto load = [&](int64_t n) {
    next_x.load(row_of<T>(args.x, chunk.b, n), width);
    next_y.load(row_of<T>(args.y, chunk.b, n), width);
    next_grad.load(row_of<T>(norm.grad, chunk.b, n), width);
  };
  load(chunk.first);
  gradients.template load<T>(norm, chunk);
  gate.load(gate_row, width);
  sum_gate.set(width, [] { return 0.0f; });
  if (!kKeeps) sum_gate.store(gate_partial, width);
  for (int64_t n = chunk.first; n < chunk.last; ++n) {
    if (!kKeeps) {
      load(n);
      gate.load(gate_row, width);
    } else {
      grad_x_new.load(row_of<T>(args.grad_x_new, chunk.b, n), width);
    }
    this_y = next_y;
    x.unpack(next_x);
    y.unpack(this_y);
    grad.unpack(next_grad);
    if (kKeeps && n + 1 < chunk.last) load(n + 1);
    add_gated<T>(x, y, gate, width);
    gradients.add_row(x, grad, norm, block_sum);
    if (!kKeeps) {
      grad_x_new.load(row_of<T>(args.grad_x_new, chunk.b, n), width);
      this_y.load(row_of<T>(args.y, chunk.b, n), width);
      gate.load(gate_row, width);
      sum_gate.load(gate_partial, width);
    }
    grad.unpack(grad_x_new);
    y.unpack(this_y);
    x.set(width, [](float through_norm, float g) { return through_norm + g; }, x, grad);
    x.store(row_of<T>(norm.grad_x, chunk.b, n), width);
    sum_gate.set(width, [](float total, float g, float w) { return total + g * w; }, sum_gate, x, y);
    if (!kKeeps) sum_gate.store(gate_partial, width);
    x.set(width, [](float g, float w) { return g * w; }, x, gate);
    x.store(row_of<T>(args.grad_y, chunk.b, n), width);
  }
  gradients.store(norm);
  if (kKeeps) sum_gate.store(gate_partial, width);
}

template <class T> __global__ void __launch_bounds__(kSumColumns* kSumRows) columns_kernel(Args args) {
  finish_columns<T>(args.norm, *reinterpret_cast<ColumnSums<2>*>(shared_memory()));
  auto& shared = *reinterpret_cast<ColumnSums<1>*>(shared_memory());
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  double sum[1];
  for (int64_t b = 0; b < args.norm.batch; ++b) {
    for (int m = 0; m < 2; ++m) {
      add_chunks(args.norm, b, m, reinterpret_cast<const float*>(args.gate_partials), i, shared, sum);
      if (threadIdx.y == 0 && i < args.norm.width)
        row_of<T>(args.grad_gate, b, m)[i] = from_accumulator<T>(static_cast<float>(sum[0]));
    }
  }
}

template <class T> bool is_all_aligned(const Args& args) {
  for (const Rows* rows : {&args.x, &args.y, &args.gate, &args.x_new, &args.grad_x_new, &args.grad_y})
    if (!is_aligned<T>(*rows)) return false;
  return is_aligned<T>(args.norm) && reinterpret_cast<uintptr_t>(args.gate_partials) % 16 == 0;
}

template <class T, class Layout> const char* launch_forward(const Args& args, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(args.norm.batch * num_chunks(args.norm, kForwardChunk));
  if (!blocks) return nullptr;
  const unsigned threads = num_threads<Layout>(args.norm);
  return launch<forward_kernel<T, Layout>>(blocks, threads, sizeof(BlockSum::Shared), stream, args);
}

template <class T, class Layout> const char* launch_backward(const Args& args, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(args.norm.batch * num_chunks(args.norm, kChunk));
  if (blocks) {
    const unsigned threads = num_threads<Layout>(args.norm);
    const char* error = launch<backward_kernel<T, Layout>>(blocks, threads, sizeof(BlockSum::Shared), stream, args);
    if (error) return error;
  }
  return launch<columns_kernel<T>>(num_column_blocks(args.norm), dim3(kSumColumns, kSumRows), sizeof(ColumnSums<2>),
                                   stream, args);
}

template <class T> const char* forward_as(const Args& args, cudaStream_t stream) {
  if (is_all_aligned<T>(args)) return launch_forward<T, Vectors<T>>(args, stream);
  return launch_forward<T, Scalars<T>>(args, stream);
}

template <class T> const char* backward_as(const Args& args, cudaStream_t stream) {
  if (is_all_aligned<T>(args)) return launch_backward<T, Vectors<T>>(args, stream);
  return launch_backward<T, Scalars<T>>(args, stream);
}

}  // namespace

const char* forward_cuda(const Args& args, int device, uintptr_t stream_address) {
  if (const char* reason = why_not(args.norm)) return reason;
  return by_dtype(args.norm.dtype, device, stream_address, [&](auto zero, cudaStream_t stream) {
    return forward_as<decltype(zero)>(args, stream);
  });
}

const char* backward_cuda(const Args& args, int device, uintptr_t stream_address) {
  if (const char* reason = why_not(args.norm)) return reason;
  return by_dtype(args.norm.dtype, device, stream_address, [&](auto zero, cudaStream_t stream) {
    return backward_as<decltype(zero)>(args, stream);
  });
}

}  // namespace cogvx::gated_expert_layernorm
