// A block takes a chunk of rows that share a modulation, keeps that in registers, and reads and writes each row once.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "expert_layernorm/expert_layernorm.h"

namespace cogvx::expert_layernorm {
namespace {

constexpr int kForwardChunk = 8;  // enough rows to share the modulation, few enough to fill a GPU
constexpr int kCudaColumns = 32;      // of a block that adds up the chunks
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

template <class T, class Layout> __global__ void __launch_bounds__(Layout::kMaxThreads, 1) forward_kernel(Args args) {
  using Row = Values<Layout::kVec, Layout::kSlots>;
  BlockSum block_sum(*reinterpret_cast<BlockSum::Shared*>(shared_memory()));
  const int width = static_cast<int>(args.width);
  const Chunk chunk = chunk_at(args, blockIdx.x, kForwardChunk);

  Row factor, offset, x;  // y = xhat * factor + offset
  {
    Row scale, shift;
    scale.load(row_of<T>(args.scale, chunk.b, chunk.m), width);
    shift.load(row_of<T>(args.shift, chunk.b, chunk.m), width);
    factor.load(reinterpret_cast<const T*>(args.weight), width);
    offset.load(reinterpret_cast<const T*>(args.bias), width);
    factor.set(width, [](float w, float s) { return w * (1.0f + s); }, factor, scale);
    offset.set(width, [](float b, float s, float t) { return b * (1.0f + s) + t; }, offset, scale, shift);
  }
  for (int64_t n = chunk.first; n < chunk.last; ++n) {
    x.load(row_of<T>(args.x, chunk.b, n), width);
    const float mean = block_sum(x.sum([](float v) { return v; })) / width;
    x.set(width, [mean](float v) { return v - mean; }, x);
    const float variance = block_sum(x.sum([](float v) { return v * v; })) / width;
    const float rstd = 1.0f / sqrtf(variance + static_cast<float>(args.eps));
    x.set(width, [rstd](float v, float f, float o) { return v * rstd * f + o; }, x, factor, offset);
    x.store(row_of<T>(args.y, chunk.b, n), width);
  }
}

// With xhat = (x - mean) * rstd and d = grad * weight * (1 + scale):
// grad_x = rstd * (d - mean(d) - xhat * mean(d * xhat)).
template <class T, class Layout> __global__ void __launch_bounds__(Layout::kMaxThreads, 1) backward_kernel(Args args) {
  using Row = Values<Layout::kVec, Layout::kSlots>;
  BlockSum block_sum(*reinterpret_cast<BlockSum::Shared*>(shared_memory()));
  const int width = static_cast<int>(args.width);
  const Chunk chunk = chunk_at(args, blockIdx.x, kChunk);

  Row factor, sum_grad, sum_grad_xhat, x, grad;
  x.load(row_of<T>(args.scale, chunk.b, chunk.m), width);
  factor.load(reinterpret_cast<const T*>(args.weight), width);
  factor.set(width, [](float w, float s) { return w * (1.0f + s); }, factor, x);
  sum_grad.set(width, [] { return 0.0f; });
  sum_grad_xhat.set(width, [] { return 0.0f; });
  for (int64_t n = chunk.first; n < chunk.last; ++n) {
    x.load(row_of<T>(args.x, chunk.b, n), width);
    grad.load(row_of<T>(args.grad, chunk.b, n), width);
    const float mean = block_sum(x.sum([](float v) { return v; })) / width;
    x.set(width, [mean](float v) { return v - mean; }, x);
    const float variance = block_sum(x.sum([](float v) { return v * v; })) / width;
    const float rstd = 1.0f / sqrtf(variance + static_cast<float>(args.eps));
    x.set(width, [rstd](float v) { return v * rstd; }, x);  // xhat
    sum_grad.set(width, [](float total, float g) { return total + g; }, sum_grad, grad);
    sum_grad_xhat.set(width, [](float total, float g, float h) { return total + g * h; }, sum_grad_xhat, grad, x);
    // d, never fused into a sum: rounded in one place and not in another, it leaves a difference where there is none.
    grad.set(width, [](float g, float f) { return __fmul_rn(g, f); }, grad, factor);
    float means[2] = {grad.sum([](float d) { return d; }), grad.sum([](float d, float h) { return d * h; }, x)};
    block_sum(means);
    const float mean_d = means[0] / width, mean_d_xhat = means[1] / width;
    x.set(width, [=](float h, float d) { return rstd * (d - mean_d - h * mean_d_xhat); }, x, grad);
    x.store(row_of<T>(args.grad_x, chunk.b, n), width);
  }
  float* partial = reinterpret_cast<float*>(args.partials) + blockIdx.x * 2 * args.width;
  sum_grad.store(partial, width);
  sum_grad_xhat.store(partial + width, width);
}

using ColumnSums = double[32][kCudaColumns];  // by row of threads

// Adds the chunks up, in an order that depends on their number alone.
template <class T> __global__ void __launch_bounds__(kCudaColumns * 32) columns_kernel(Args args) {
  auto* shared = reinterpret_cast<ColumnSums*>(shared_memory());
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCudaColumns + threadIdx.x;
  const int64_t per_sample = num_chunks(args, kChunk), num_text_chunks = num_chunks(args.num_text, kChunk);
  double grad_weight = 0, grad_bias = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    for (int m = 0; m < 2; ++m) {
      double sum_grad = 0, sum_grad_xhat = 0;
      const int64_t end = m ? per_sample : num_text_chunks;
      for (int64_t c = (m ? num_text_chunks : 0) + threadIdx.y; c < end && i < args.width; c += 32) {
        const float* partial = reinterpret_cast<const float*>(args.partials) + (b * per_sample + c) * 2 * args.width;
        sum_grad += partial[i];
        sum_grad_xhat += partial[args.width + i];
      }
      shared[0][threadIdx.y][threadIdx.x] = sum_grad;
      shared[1][threadIdx.y][threadIdx.x] = sum_grad_xhat;
      __syncthreads();
      if (threadIdx.y == 0 && i < args.width) {
        for (int y = 1; y < 32; ++y) {
          sum_grad += shared[0][y][threadIdx.x];
          sum_grad_xhat += shared[1][y][threadIdx.x];
        }
        const double modulation = 1.0 + to_accumulator(row_of<T>(args.scale, b, m)[i]);
        const double weight = to_accumulator(reinterpret_cast<const T*>(args.weight)[i]);
        const double bias = to_accumulator(reinterpret_cast<const T*>(args.bias)[i]);
        grad_weight += sum_grad_xhat * modulation;
        grad_bias += sum_grad * modulation;
        row_of<T>(args.grad_shift, b, m)[i] = from_accumulator<T>(static_cast<float>(sum_grad));
        row_of<T>(args.grad_scale, b, m)[i] =
            from_accumulator<T>(static_cast<float>(sum_grad_xhat * weight + sum_grad * bias));
      }
      __syncthreads();
    }
  }
  if (threadIdx.y == 0 && i < args.width) {
    reinterpret_cast<T*>(args.grad_weight)[i] = from_accumulator<T>(static_cast<float>(grad_weight));
    reinterpret_cast<T*>(args.grad_bias)[i] = from_accumulator<T>(static_cast<float>(grad_bias));
  }
}

template <class T> bool is_aligned(const Args& args) {
  constexpr int kVec = Vectors<T>::kVec;
  const auto fits = [](const Rows& rows) {
    return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride_b % kVec == 0 && rows.stride_n % kVec == 0;
  };
  const auto row_fits = [](const char* row) { return reinterpret_cast<uintptr_t>(row) % 16 == 0; };
  return args.width % kVec == 0 && fits(args.x) && fits(args.shift) && fits(args.scale) && fits(args.y) &&
         fits(args.grad) && fits(args.grad_x) && row_fits(args.weight) && row_fits(args.bias) &&
         row_fits(args.partials);
}

template <class Layout> unsigned num_threads(const Args& args) {
  const int64_t values = Layout::kVec * Layout::kSlots * 32;  // of a warp
  return static_cast<unsigned>((args.width + values - 1) / values * 32);
}

template <class T, class Layout> const char* launch_forward(const Args& args, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(args.batch * num_chunks(args, kForwardChunk));
  if (!blocks) return nullptr;
  return launch<forward_kernel<T, Layout>>(blocks, num_threads<Layout>(args), sizeof(BlockSum::Shared), stream, args);
}

template <class T, class Layout> const char* launch_backward(const Args& args, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(args.batch * num_chunks(args, kChunk));
  constexpr auto kernel = backward_kernel<T, Layout>;
  const char* error = nullptr;
  if (blocks) error = launch<kernel>(blocks, num_threads<Layout>(args), sizeof(BlockSum::Shared), stream, args);
  if (error) return error;
  const unsigned column_blocks = static_cast<unsigned>((args.width + kCudaColumns - 1) / kCudaColumns);
  return launch<columns_kernel<T>>(column_blocks, dim3(kCudaColumns, 32), 2 * sizeof(ColumnSums), stream, args);
}

template <class T> const char* forward_as(const Args& args, cudaStream_t stream) {
  if (is_aligned<T>(args)) return launch_forward<T, Vectors<T>>(args, stream);
  return launch_forward<T, Scalars<T>>(args, stream);
}

template <class T> const char* backward_as(const Args& args, cudaStream_t stream) {
  if (is_aligned<T>(args)) return launch_backward<T, Vectors<T>>(args, stream);
  return launch_backward<T, Scalars<T>>(args, stream);
}

const char* why_not(const Args& args) {
  return args.width < 1 || args.width > kMaxWidth ? "the width must be from 1 to 4096" : nullptr;
}

}  // namespace

const char* forward_cuda(const Args& args, int device, uintptr_t stream_address) {
  if (const char* reason = why_not(args)) return reason;
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  if (args.dtype == DType::float32) return forward_as<float>(args, stream);
  if (args.dtype == DType::float16) return forward_as<__half>(args, stream);
  if (args.dtype == DType::bfloat16) return forward_as<__nv_bfloat16>(args, stream);
  return "a dtype that is not compiled";
}

const char* backward_cuda(const Args& args, int device, uintptr_t stream_address) {
  if (const char* reason = why_not(args)) return reason;
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  if (args.dtype == DType::float32) return backward_as<float>(args, stream);
  if (args.dtype == DType::float16) return backward_as<__half>(args, stream);
  if (args.dtype == DType::bfloat16) return backward_as<__nv_bfloat16>(args, stream);
  return "a dtype that is not compiled";
}

}  // namespace cogvx::expert_layernorm
