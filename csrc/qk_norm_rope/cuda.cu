// A block takes a chunk of tokens and one of q, k and v. A few lanes of a warp hold a head's row; they keep the token's
// angles and the norm's weights and go from head to head, so that sums over heads stay in their registers.
#include "common/by_dtype.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "qk_norm_rope/qk_norm_rope.h"

namespace cogvx::qk_norm_rope {
namespace {

constexpr int kV = 2;  // the index of v among q, k, v
constexpr int kThreads = 128, kMaxWidth = 256;

// Heads of the released width, in vectors of 16 bytes; kAhead heads are on their way together.
template <class T> struct Heads64 {
  static constexpr int kWidth = 64, kVec = 16 / sizeof(T), kSlots = 1, kLanes = kWidth / kVec, kAhead = 4;
};
// Other widths and alignments: a warp a head, value by value.
template <class T> struct AnyHeads {
  static constexpr int kWidth = 0, kVec = 1, kSlots = kMaxWidth / 32, kLanes = 32, kAhead = 1;
};

template <class Layout> struct Of {
  using Row = Values<Layout::kVec, Layout::kSlots, Layout::kLanes>;
  template <class T> using Packed = typename Row::template Packed<T>;
  static constexpr int kGroups = kThreads / Layout::kLanes;  // rows that a block works on at once
};

struct Task {
  int64_t b, first, last;  // tokens first <= n < last
  int part;

  __device__ explicit Task(const Args& args) {
    const int64_t chunks = (args.num_rows + kChunk - 1) / kChunk, index = blockIdx.x / 3;
    part = blockIdx.x % 3;
    b = index / chunks;
    first = index % chunks * kChunk;
    last = first + kChunk < args.num_rows ? first + kChunk : args.num_rows;
  }
};

template <class T> __device__ T* row_of(const Rows& qkv, const Args& args, const Task& task, int64_t n) {
  return reinterpret_cast<T*>(qkv.data) + task.b * qkv.stride_b + n * qkv.stride_n +
         task.part * args.num_heads * args.width;
}

template <class T> __device__ T* row_of(const Heads& heads, const Task& task, int64_t n) {
  return reinterpret_cast<T*>(heads.data) + task.b * heads.stride_b + n * heads.stride_n;
}

// (-x[2i+1], x[2i]) for every pair.
template <int kVec, int kSlots, int kLanes>
__device__ Values<kVec, kSlots, kLanes> across(const Values<kVec, kSlots, kLanes>& x) {
  Values<kVec, kSlots, kLanes> y;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    if constexpr (kVec == 1) {
      const float other = __shfl_xor_sync(0xffffffffu, x.v[s][0], 1);
      y.v[s][0] = threadIdx.x % 2 ? other : -other;
    } else {
#pragma unroll
      for (int k = 0; k < kVec; k += 2) {
        y.v[s][k] = -x.v[s][k + 1];
        y.v[s][k + 1] = x.v[s][k];
      }
    }
  }
  return y;
}

// x becomes xhat = (x - mean) * rstd; returns rstd. Centered twice: the differences keep their digits also where the
// mean is far larger. `inside` is the width, or 0 where there is no row.
template <int kVec, int kSlots, int kLanes>
__device__ float normalize(Values<kVec, kSlots, kLanes>& x, int inside, int width, float eps) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float mean = sum_of_lanes<kLanes>(x.sum([](float v) { return v; })) / width;
    x.set(inside, [mean](float v) { return v - mean; }, x);
  }
  const float variance = sum_of_lanes<kLanes>(x.sum([](float v) { return v * v; })) / width;
  const float rstd = 1.0f / sqrtf(variance + eps);
  x.set(inside, [rstd](float v) { return v * rstd; }, x);
  return rstd;
}

// f(token, inside) for every token of the chunk, all lanes of a warp together; `inside` is 0 behind the last token.
template <class Layout, class F> __device__ void each_token(const Task& task, int width, F f) {
#pragma unroll 1
  for (int i = threadIdx.x / Layout::kLanes; i < kChunk; i += Of<Layout>::kGroups) {
    const int64_t n = task.first + i;
    f(n, n < task.last ? width : 0);
  }
}

template <class T, class Layout> __global__ void __launch_bounds__(kThreads, 4) forward_kernel(Args args) {
  using Row = typename Of<Layout>::Row;
  const int width = Layout::kWidth ? Layout::kWidth : static_cast<int>(args.width);
  const int num_heads = static_cast<int>(args.num_heads);
  const Task task(args);
  const Heads& heads = args.y[task.part];
  const float eps = static_cast<float>(args.eps);

  Row weight, bias, cos, sin, x;
  if (task.part != kV) {
    weight.load(reinterpret_cast<const T*>(args.weight[task.part]), width);
    bias.load(reinterpret_cast<const T*>(args.bias[task.part]), width);
  }
  each_token<Layout>(task, width, [&](int64_t n, int inside) {
    const bool turns = args.cos && n >= args.num_text && inside && task.part != kV;
    const int64_t angle = (n - args.num_text) * width;
    cos.load(reinterpret_cast<const float*>(args.cos) + angle, turns ? width : 0);
    sin.load(reinterpret_cast<const float*>(args.sin) + angle, turns ? width : 0);
    const T* from = row_of<T>(args.qkv, args, task, n);
    T* to = row_of<T>(heads, task, n);
#pragma unroll 1
    for (int first = 0; first < num_heads; first += Layout::kAhead) {
      typename Of<Layout>::template Packed<T> packed[Layout::kAhead];
#pragma unroll
      for (int i = 0; i < Layout::kAhead; ++i)
        packed[i].load(from + (first + i) * width, first + i < num_heads ? inside : 0);
#pragma unroll
      for (int i = 0; i < Layout::kAhead; ++i) {
        if (first + i >= num_heads) break;
        T* y = to + (first + i) * heads.stride_a;
        if (task.part == kV) {
          packed[i].store(y, inside);
          continue;
        }
        x.unpack(packed[i]);
        normalize(x, inside, width, eps);
        x.set(inside, [](float h, float w, float b) { return h * w + b; }, x, weight, bias);
        const Row turned = across(x);
        if (turns) x.set(width, [](float z, float c, float t, float s) { return z * c + t * s; }, x, cos, turned, sin);
        x.store(y, inside);
      }
    }
  });
}

// With g the result's gradient turned back and d = g * weight: grad_x = rstd * (d - mean(d) - xhat * mean(d * xhat)).
template <class T, class Layout, bool kAngles> struct Backward {
  using Row = typename Of<Layout>::Row;
  Row weight, bias, cos, sin, grad_cos, grad_sin, sum_g, sum_g_xhat;

  __device__ Backward(const Args& args, int part, int width) {
    weight.load(reinterpret_cast<const T*>(args.weight[part]), width);
    if (kAngles) bias.load(reinterpret_cast<const T*>(args.bias[part]), width);
    sum_g.set(width, [] { return 0.0f; });
    sum_g_xhat.set(width, [] { return 0.0f; });
  }

  // x becomes its gradient. Without angles to turn by, cos and sin are not read.
  __device__ void add_row(Row& x, Row& g, bool turns, int inside, int width, float eps) {
    const float rstd = normalize(x, inside, width, eps);
    if (kAngles) {
      Row z, turned;
      z.set(inside, [](float h, float w, float b) { return h * w + b; }, x, weight, bias);
      turned = across(z);
      const auto add = [](float total, float a, float b) { return total + a * b; };
      grad_cos.set(inside, add, grad_cos, g, z);
      grad_sin.set(inside, add, grad_sin, g, turned);
    }
    Row by_sin;
    by_sin.set(turns ? inside : 0, [](float v, float s) { return v * s; }, g, sin);
    by_sin = across(by_sin);
    if (turns) g.set(inside, [](float v, float c, float t) { return v * c - t; }, g, cos, by_sin);
    sum_g.set(width, [](float total, float v) { return total + v; }, sum_g, g);  // 0 where there is no row
    sum_g_xhat.set(width, [](float total, float v, float h) { return total + v * h; }, sum_g_xhat, g, x);
    // d, never fused into a sum: rounded in one place and not in another, it leaves a difference where there is none.
    g.set(inside, [](float v, float w) { return __fmul_rn(v, w); }, g, weight);
    const float mean_d = sum_of_lanes<Layout::kLanes>(g.sum([](float d) { return d; })) / width;
    const float mean_d_xhat = sum_of_lanes<Layout::kLanes>(g.sum([](float d, float h) { return d * h; }, x)) / width;
    x.set(inside, [=](float h, float d) { return rstd * (d - mean_d - h * mean_d_xhat); }, x, g);
  }

  // The sums over the block's rows, in the order of their groups: [2, E] of grad * xhat and of grad.
  __device__ void store(double* sums, int width) {
    constexpr int kGroups = Of<Layout>::kGroups, kWidth = Layout::kWidth ? Layout::kWidth : kMaxWidth;
    auto* shared = reinterpret_cast<float(*)[kGroups][kWidth]>(shared_memory());
    const int group = threadIdx.x / Layout::kLanes;
    sum_g_xhat.store(shared[0][group], width);
    sum_g.store(shared[1][group], width);
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * width; i += kThreads) {
      double total = 0;
      for (int j = 0; j < kGroups; ++j) total += shared[i / width][j][i % width];
      sums[i] = total;
    }
  }
};

template <class T, class Layout>
__device__ void copy_gradient(const Args& args, const Task& task, int width) {  // of v
  each_token<Layout>(task, width, [&](int64_t n, int inside) {
    const T* from = row_of<T>(args.grad[kV], task, n);
    T* to = row_of<T>(args.grad_qkv, args, task, n);
#pragma unroll 4
    for (int a = 0; a < static_cast<int>(args.num_heads); ++a) {
      typename Of<Layout>::template Packed<T> packed;
      packed.load(from + a * args.grad[kV].stride_a, inside);
      packed.store(to + a * width, inside);
    }
  });
}

template <class T, class Layout, bool kAngles>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(Args args) {
  using Row = typename Of<Layout>::Row;
  using Packed = typename Of<Layout>::template Packed<T>;
  const int width = Layout::kWidth ? Layout::kWidth : static_cast<int>(args.width);
  const int num_heads = static_cast<int>(args.num_heads);
  const Task task(args);
  if (task.part == kV) return copy_gradient<T, Layout>(args, task, width);
  const Heads& heads = args.grad[task.part];
  const float eps = static_cast<float>(args.eps);

  Backward<T, Layout, kAngles> backward(args, task.part, width);
  Row x, grad;
  each_token<Layout>(task, width, [&](int64_t n, int inside) {
    const bool turns = args.cos && n >= args.num_text && inside;
    const int64_t angle = (n - args.num_text) * width;
    backward.cos.load(reinterpret_cast<const float*>(args.cos) + angle, turns ? width : 0);
    backward.sin.load(reinterpret_cast<const float*>(args.sin) + angle, turns ? width : 0);
    backward.grad_cos.set(width, [] { return 0.0f; });
    backward.grad_sin.set(width, [] { return 0.0f; });
    const T *from = row_of<T>(args.qkv, args, task, n), *from_grad = row_of<T>(heads, task, n);
    T* to = row_of<T>(args.grad_qkv, args, task, n);
    Packed next_x, next_grad;
    next_x.load(from, inside);
    next_grad.load(from_grad, inside);
#pragma unroll 1
    for (int a = 0; a < num_heads; ++a) {
      x.unpack(next_x);
      grad.unpack(next_grad);
      next_x.load(from + (a + 1) * width, a + 1 < num_heads ? inside : 0);
      next_grad.load(from_grad + (a + 1) * heads.stride_a, a + 1 < num_heads ? inside : 0);
      backward.add_row(x, grad, turns, inside, width, eps);
      x.store(to + a * width, inside);
    }
    if (!kAngles || !turns) return;
    const int64_t of_part = (task.b * 2 + task.part) * (args.num_rows - args.num_text) * width;
    backward.grad_cos.store(reinterpret_cast<float*>(args.grad_cos) + of_part + angle, width);
    backward.grad_sin.store(reinterpret_cast<float*>(args.grad_sin) + of_part + angle, width);
  });
  backward.store(args.partials + (static_cast<int64_t>(blockIdx.x / 3) * 2 + task.part) * 2 * width, width);
}

bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

template <class T> bool is_aligned(const Args& args) {
  constexpr int kVec = 16 / sizeof(T);
  for (const Rows* rows : {&args.qkv, &args.grad_qkv})
    if (!is_aligned(rows->data) || rows->stride_b % kVec || rows->stride_n % kVec) return false;
  for (const auto* part : {&args.y, &args.grad})
    for (const Heads& heads : *part)
      if (!is_aligned(heads.data) || heads.stride_b % kVec || heads.stride_a % kVec || heads.stride_n % kVec)
        return false;
  for (int i = 0; i < 2; ++i)
    if (!is_aligned(args.weight[i]) || !is_aligned(args.bias[i])) return false;
  return is_aligned(args.cos) && is_aligned(args.sin) && is_aligned(args.grad_cos) && is_aligned(args.grad_sin);
}

unsigned num_blocks(const Args& args) {
  return static_cast<unsigned>(args.batch * ((args.num_rows + kChunk - 1) / kChunk) * 3);
}

template <class T, class Layout> const char* launch_backward(const Args& args, cudaStream_t stream) {
  constexpr int kWidth = Layout::kWidth ? Layout::kWidth : kMaxWidth;
  constexpr size_t kShared = 2 * Of<Layout>::kGroups * kWidth * sizeof(float);
  if (args.grad_cos) return launch<backward_kernel<T, Layout, true>>(num_blocks(args), kThreads, kShared, stream, args);
  return launch<backward_kernel<T, Layout, false>>(num_blocks(args), kThreads, kShared, stream, args);
}

template <class T> const char* forward_as(const Args& args, cudaStream_t stream) {
  if (args.width == 64 && is_aligned<T>(args))
    return launch<forward_kernel<T, Heads64<T>>>(num_blocks(args), kThreads, 0, stream, args);
  return launch<forward_kernel<T, AnyHeads<T>>>(num_blocks(args), kThreads, 0, stream, args);
}

template <class T> const char* backward_as(const Args& args, cudaStream_t stream) {
  if (args.width == 64 && is_aligned<T>(args)) return launch_backward<T, Heads64<T>>(args, stream);
  return launch_backward<T, AnyHeads<T>>(args, stream);
}

const char* why_not(const Args& args) {
  return args.width < 1 || args.width > kMaxWidth ? "the head width must be from 1 to 256" : nullptr;
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

}  // namespace cogvx::qk_norm_rope
