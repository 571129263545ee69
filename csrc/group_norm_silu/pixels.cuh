// What the kernels of this norm and of the spatial one do with a pixel; the latter scales and shifts it by the latent.
//
// A thread keeps what it needs of a few channels, kVec of them side by side in memory, and goes from pixel to pixel.
#pragma once

#include "common/by_dtype.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "group_norm_silu/stage.h"

namespace cogvx::group_norm_silu {
namespace {

constexpr int kThreads = 256;

// How many threads share a pixel of a block, and how many pixels a block works on at once.
template <int kVec> COGVX_HOST_DEVICE int threads_of_pixel(const Stage& stage) {
  const int64_t vectors = stage.channels / kVec;
  return static_cast<int>(vectors < kThreads ? vectors : kThreads);
}
template <int kVec> COGVX_HOST_DEVICE int pixels_at_once(const Stage& stage) {
  return kThreads / threads_of_pixel<kVec>(stage);
}

// Where a thread stands: its pixel among those of the block, and its first channel; blockIdx.y goes over the channels.
template <int kVec> struct Place {
  int pixel, channel;
  bool is_inside;

  __device__ explicit Place(const Stage& stage) {
    const int across = threads_of_pixel<kVec>(stage), thread = threadIdx.x;
    pixel = thread / across;
    channel = (static_cast<int>(blockIdx.y) * kThreads + thread % across) * kVec;
    is_inside = pixel < kThreads / across && channel < stage.channels;
  }
};

template <class T> __device__ float exponential(float v) {
  if constexpr (sizeof(T) == 2) return __expf(v);
  return expf(v);
}
template <class T> __device__ double exponential(double v) { return exp(v); }

template <class T> __device__ float quotient(float a, float b) {
  if constexpr (sizeof(T) == 2) return __fdividef(a, b);
  return a / b;
}
template <class T> __device__ double quotient(double a, double b) { return a / b; }

// Never fused with a sum: what is in one sum and a factor in another must be the same number in both.
__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double product(double a, double b) { return a * b; }

template <class T> __device__ float silu(float v) {
  return quotient<T>(v, 1.0f + exponential<T>(-fmaxf(v, -80.0f)));
}

template <class T, class A> __device__ A silu_derivative(A v) {
  const A one = 1, e = exponential<T>(-(v > -80 ? v : A{-80}));  // finite, so that e * s is 1 - s
  const A s = quotient<T>(one, one + e);
  return s * (one + v * (e * s));
}

template <class T, int kVec> __device__ Vec<T, kVec> load_vector(const T* from) {
  return *reinterpret_cast<const Vec<T, kVec>*>(from);
}

template <class T, class A, int kVec> __device__ void load_widened(const T* from, A (&values)[kVec]) {
  const Vec<T, kVec> packed = load_vector<T, kVec>(from);
#pragma unroll
  for (int k = 0; k < kVec; ++k) values[k] = to_accumulator(packed.v[k]);
}

template <class A, int kVec> __device__ void load_narrowed(const double* from, A (&values)[kVec]) {
  const Vec<double, kVec> packed = load_vector<double, kVec>(from);
#pragma unroll
  for (int k = 0; k < kVec; ++k) values[k] = static_cast<A>(packed.v[k]);
}

// Stores of 16 bytes, where there is more than one value.
template <class A, int kVec> __device__ void store_vector(A* to, const A (&values)[kVec]) {
  constexpr int kWidth = kVec == 1 ? 1 : 16 / sizeof(A);
#pragma unroll
  for (int start = 0; start < kVec; start += kWidth) {
    Vec<A, kWidth> packed;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) packed.v[k] = values[start + k];
    *reinterpret_cast<Vec<A, kWidth>*>(to + start) = packed;
  }
}

// GroupNorm(x) = (x - mean) * factor + offset.
template <int kVec, class A = float> struct Channels {
  A mean[kVec], factor[kVec], offset[kVec];

  __device__ Channels(const Stage& stage, int64_t b, int channel) {
    A weight[kVec];
    load_narrowed(stage.statistics + b * 2 * stage.channels + channel, mean);
    load_narrowed(stage.statistics + (b * 2 + 1) * stage.channels + channel, factor);
    load_widened<float>(stage.weight + channel, weight);
    load_widened<float>(stage.bias + channel, offset);
#pragma unroll
    for (int k = 0; k < kVec; ++k) factor[k] *= weight[k];
  }
};

// Where nearest resizing finds pixel i of `size` among `count`, in float as PyTorch does.
__device__ inline int nearest(int i, int64_t size, int64_t count) {
  const float scale = static_cast<float>(count) / static_cast<float>(size);
  return min(static_cast<int>(__fmul_rn(static_cast<float>(i), scale)), static_cast<int>(count) - 1);
}

// How many frames stand alone before those that are resized.
__device__ inline int frames_alone(const Stage& stage) { return stage.frames > 1 && stage.frames % 2 == 1 ? 1 : 0; }

// The row of the latent that belongs to a piece's row.
__device__ inline int64_t latent_row(const Stage& stage, const Piece& piece) {
  const int alone = frames_alone(stage), t = static_cast<int>(piece.frame);
  const int of_rest = nearest(max(t - alone, 0), stage.frames - alone, stage.latent_frames - alone);
  const int64_t frame = t < alone ? 0 : alone + of_rest;
  return frame * stage.latent_height + nearest(static_cast<int>(piece.row), stage.height, stage.latent_height);
}

// Scale and shift of the pixels of one row, at this thread's channels.
template <class T, int kVec> struct Latent {
  Vec<T, kVec> scale, shift;

  __device__ void load(const Stage& stage, const T* row, int column) {
    const T* at = row + static_cast<int64_t>(nearest(column, stage.width, stage.latent_width)) * 2 * stage.channels;
    scale = load_vector<T, kVec>(at);
    shift = load_vector<T, kVec>(at + stage.channels);
  }
};

template <class T> __device__ const T* latent_of(const Stage& stage, const Piece& piece, int64_t b, int channel) {
  const int64_t row = b * stage.latent_frames * stage.latent_height + latent_row(stage, piece);
  return reinterpret_cast<const T*>(stage.latent) + row * stage.latent_width * 2 * stage.channels + channel;
}

// The first pixel of a piece's row in a video with `before` frames before those of x.
template <class T>
__device__ T* row_of(const Stage& stage, const Piece& piece, char* video, int64_t before, int64_t b, int channel) {
  const int64_t frame = b * (before + stage.frames) + before + piece.frame;
  return reinterpret_cast<T*>(video) + (frame * stage.height + piece.row) * stage.width * stage.channels + channel;
}

template <class T, int kVec, bool kIsSpatial> __global__ void __launch_bounds__(kThreads, 2) apply_kernel(Stage stage) {
  constexpr int kAhead = kIsSpatial ? 2 : 4;  // pixels on their way together
  const Place<kVec> place(stage);
  if (!place.is_inside) return;
  const int64_t b = blockIdx.z, channels = stage.channels, frame = stage.height * stage.width * channels;
  // The end of x may still be in the cache.
  const Piece piece = piece_at(stage, gridDim.x - 1 - blockIdx.x, Grain::fine);
  const Channels<kVec> of(stage, b, place.channel);
  const T* x = row_of<T>(stage, piece, stage.x, 0, b, place.channel);
  T* y = row_of<T>(stage, piece, stage.y, stage.num_halo, b, place.channel);
  const T* latent = kIsSpatial ? latent_of<T>(stage, piece, b, place.channel) : nullptr;
  const int step = pixels_at_once<kVec>(stage);
  const int64_t num_copies = piece.frame == 0 ? stage.num_copies : 0;
#pragma unroll 1
  for (int start = piece.first + place.pixel; start < piece.last; start += kAhead * step) {
    Vec<T, kVec> values[kAhead];
    Latent<T, kVec> by[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int column = start + i * step;
      if (column >= piece.last) break;
      values[i] = load_vector<T, kVec>(x + column * channels);
      if (kIsSpatial) by[i].load(stage, latent, column);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int column = start + i * step;
      if (column >= piece.last) break;
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        float v = (to_accumulator(values[i].v[k]) - of.mean[k]) * of.factor[k] + of.offset[k];
        if (kIsSpatial) v = v * to_accumulator(by[i].scale.v[k]) + to_accumulator(by[i].shift.v[k]);
        values[i].v[k] = from_accumulator<T>(silu<T>(v));
      }
#pragma unroll 1
      for (int64_t copy = 0; copy <= num_copies; ++copy)
        *reinterpret_cast<Vec<T, kVec>*>(y + column * channels - copy * frame) = values[i];
    }
  }
}

// The gradient of y's pixel: `own`, that of the frame itself at `grad`, and of its copies where there are some.
template <class T, class A, int kVec>
__device__ void add_copies(const Vec<T, kVec>& own, const T* grad, int num_copies, int64_t frame, A (&g)[kVec]) {
#pragma unroll
  for (int k = 0; k < kVec; ++k) g[k] = to_accumulator(own.v[k]);
#pragma unroll 1
  for (int copy = 1; copy <= num_copies; ++copy) {
    const Vec<T, kVec> other = load_vector<T, kVec>(grad - copy * frame);
#pragma unroll
    for (int k = 0; k < kVec; ++k) g[k] += to_accumulator(other.v[k]);
  }
}

// f(x's pixel, g, column) for the columns first, first + step, ... before `last`; kAhead of them on their way together.
template <int kAhead, class T, class A, int kVec, class F>
__device__ void each_gradient(const T* x, const T* grad, int first, int last, int step, int channels, int num_copies,
                              int64_t frame, F f) {
#pragma unroll 1
  for (int start = first; start < last; start += kAhead * step) {
    Vec<T, kVec> values[kAhead], own[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int column = start + i * step;
      if (column >= last) break;
      values[i] = load_vector<T, kVec>(x + static_cast<int64_t>(column) * channels);
      own[i] = load_vector<T, kVec>(grad + static_cast<int64_t>(column) * channels);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int column = start + i * step;
      if (column >= last) break;
      A g[kVec];
      add_copies(own[i], grad + static_cast<int64_t>(column) * channels, num_copies, frame, g);
      f(values[i], g, column);
    }
  }
}

// dL/dx = d * factor + constant + (x - mean) * slope, with d = dL/dv times scale.
template <class T, class A, int kVec, bool kIsSpatial>
__global__ void __launch_bounds__(kThreads, 2) gradient_kernel(Stage stage) {
  const Place<kVec> place(stage);
  if (!place.is_inside) return;
  const int64_t b = blockIdx.z, frame = stage.height * stage.width * stage.channels;
  const int channels = static_cast<int>(stage.channels);
  const Piece piece = piece_at(stage, gridDim.x - 1 - blockIdx.x, Grain::fine);
  const Channels<kVec, A> of(stage, b, place.channel);
  A constant[kVec], slope[kVec];
  load_narrowed(stage.ends + b * 2 * channels + place.channel, constant);
  load_narrowed(stage.ends + (b * 2 + 1) * channels + place.channel, slope);
  const T* x = row_of<T>(stage, piece, stage.x, 0, b, place.channel);
  const T* grad = row_of<T>(stage, piece, stage.grad, stage.num_halo, b, place.channel);
  T* grad_x = row_of<T>(stage, piece, stage.grad_x, 0, b, place.channel);
  const T* latent = kIsSpatial ? latent_of<T>(stage, piece, b, place.channel) : nullptr;
  const int step = pixels_at_once<kVec>(stage);
  const int num_copies = piece.frame == 0 ? static_cast<int>(stage.num_copies) : 0;
  const auto each = [&](Vec<T, kVec> values, const A(&g)[kVec], int column) {
    Latent<T, kVec> by;
    if (kIsSpatial) by.load(stage, latent, column);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const A centered = A{to_accumulator(values.v[k])} - of.mean[k];
      const A scale = kIsSpatial ? to_accumulator(by.scale.v[k]) : 1.0f;
      A v = centered * of.factor[k] + of.offset[k];
      if (kIsSpatial) v = v * scale + to_accumulator(by.shift.v[k]);
      const A d = product(product(g[k], silu_derivative<T>(v)), scale);
      const A result = product(d, of.factor[k]) + (constant[k] + product(centered, slope[k]));
      values.v[k] = from_accumulator<T>(static_cast<float>(result));
    }
    *reinterpret_cast<Vec<T, kVec>*>(grad_x + static_cast<int64_t>(column) * channels) = values;
  };
  constexpr int kAhead = kIsSpatial || sizeof(T) == 2 ? 1 : 2;  // what registers allow
  const int first = piece.first + place.pixel;
  each_gradient<kAhead, T, A, kVec>(x, grad, first, piece.last, step, channels, num_copies, frame, each);
}

// f(channel, a, b) for every channel of a block: the sums of its threads' a and b, in the order of their pixels.
template <int kVec, class A> constexpr size_t kSumsBytes = 2 * kThreads * kVec * sizeof(A);

template <int kVec, class A, class F>
__device__ void add_pixels(const Stage& stage, const Place<kVec>& place, const A (&a)[kVec], const A (&b)[kVec], F f) {
  A* shared = reinterpret_cast<A*>(shared_memory());
  const int across = threads_of_pixel<kVec>(stage) * kVec, pixels = pixels_at_once<kVec>(stage);
  const int first = static_cast<int>(blockIdx.y) * kThreads * kVec;
  if (place.is_inside) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      shared[place.pixel * across + place.channel - first + k] = a[k];
      shared[(pixels + place.pixel) * across + place.channel - first + k] = b[k];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < across && first + i < stage.channels; i += kThreads) {
    double sum_a = 0, sum_b = 0;
    for (int pixel = 0; pixel < pixels; ++pixel) {
      sum_a += shared[pixel * across + i];
      sum_b += shared[(pixels + pixel) * across + i];
    }
    f(first + i, sum_a, sum_b);
  }
}

// Whether what belongs to a pixel's channels can be read in vectors of 16 bytes.
template <class T> bool is_aligned(const Stage& stage) {
  const void* tensors[] = {stage.x,    stage.y,      stage.weight, stage.bias,       stage.statistics,
                           stage.grad, stage.grad_x, stage.latent, stage.grad_latent, stage.ends};
  for (const void* tensor : tensors)
    if (reinterpret_cast<uintptr_t>(tensor) % 16) return false;
  return stage.channels * sizeof(T) % 16 == 0;
}

template <int kVec> dim3 grid_of(const Stage& stage, int64_t blocks) {
  const int64_t vectors = stage.channels / kVec;
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>((vectors + kThreads - 1) / kThreads),
              static_cast<unsigned>(stage.batch));
}

inline const char* why_not(const Stage& stage) {
  if (stage.batch > 65535) return "more than 65535 samples";
  return stage.height * stage.width > 1 << 30 ? "more than 2^30 pixels a frame" : nullptr;
}

// Calls launch<T, kVec>(stage, stream), kVec being 1 where vectors do not fit.
template <class Launch> const char* run(const Stage& stage, int device, uintptr_t address, Launch launch) {
  if (const char* reason = why_not(stage)) return reason;
  return by_dtype(stage.dtype, device, address, [&](auto zero, cudaStream_t stream) {
    using T = decltype(zero);
    if (is_aligned<T>(stage)) return launch.template operator()<T, 16 / sizeof(T)>(stage, stream);
    return launch.template operator()<T, 1>(stage, stream);
  });
}

// Calls launch(zero) with a zero of the type in which sums and gradients are made.
template <class T, class Launch> const char* in_arithmetic(const Stage& stage, Launch launch) {
  if constexpr (sizeof(T) == sizeof(float))
    if (stage.in_double) return launch(double{});
  return launch(float{});
}

template <bool kIsSpatial> struct Apply {
  template <class T, int kVec> const char* operator()(const Stage& stage, cudaStream_t stream) const {
    const dim3 grid = grid_of<kVec>(stage, num_pieces(stage, Grain::fine));
    return launch<apply_kernel<T, kVec, kIsSpatial>>(grid, kThreads, 0, stream, stage);
  }
};

template <bool kIsSpatial> struct Gradient {
  template <class T, int kVec> const char* operator()(const Stage& stage, cudaStream_t stream) const {
    const dim3 grid = grid_of<kVec>(stage, num_pieces(stage, Grain::fine));
    return in_arithmetic<T>(stage, [&](auto zero) {
      return launch<gradient_kernel<T, decltype(zero), kVec, kIsSpatial>>(grid, kThreads, 0, stream, stage);
    });
  }
};

}  // namespace
}  // namespace cogvx::group_norm_silu
