// The stages of group_norm_silu with the latent in them; the sums are those of each latent pixel.
#include "group_norm_silu/pixels.cuh"
#include "spatial_norm_silu/spatial_norm_silu.h"

namespace cogvx::spatial_norm_silu {
namespace {

using namespace cogvx::group_norm_silu;

// Pixels first <= i < last of x, of those along one dimension.
struct Range {
  int first, last;
};

// The first of `size` pixels whose nearest among `count` is j or a later one.
__device__ int first_of(int64_t size, int64_t count, int j) {
  int i = static_cast<int>(j * size / count);
  while (i > 0 && nearest(i - 1, size, count) >= j) --i;
  while (i < size && nearest(i, size, count) < j) ++i;
  return i;
}

__device__ Range pixels_of(int64_t size, int64_t count, int j) {
  return {first_of(size, count, j), first_of(size, count, j + 1)};
}

__device__ Range frames_of(const Stage& stage, int latent_frame) {
  const int alone = frames_alone(stage);
  if (latent_frame < alone) return {0, 1};
  const Range rest = pixels_of(stage.frames - alone, stage.latent_frames - alone, latent_frame - alone);
  return {rest.first + alone, rest.last + alone};
}

// Sums over the pixels of x that belong to one latent pixel: of d = dL/dv, and of d * (x - mean).
template <class T, class A, int kVec> struct PixelSums {
  A d[kVec], d_x[kVec];

  __device__ void add(const Stage& stage, const Channels<kVec, A>& of, int64_t b, int channel, const Range& frames,
                      const Range& rows, const Range& columns, const A (&scale)[kVec], const A (&shift)[kVec]) {
    const int channels = static_cast<int>(stage.channels);
    const int64_t frame = stage.height * stage.width * channels;
#pragma unroll
    for (int k = 0; k < kVec; ++k) d[k] = d_x[k] = 0;
    const auto each = [&](const Vec<T, kVec>& values, const A(&g)[kVec], int) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const A centered = A{to_accumulator(values.v[k])} - of.mean[k];
        const A v = (centered * of.factor[k] + of.offset[k]) * scale[k] + shift[k];
        const A found = product(g[k], silu_derivative<T>(v));
        d[k] += found;
        d_x[k] += found * centered;
      }
    };
    for (int t = frames.first; t < frames.last; ++t) {
      const int num_copies = t == 0 ? static_cast<int>(stage.num_copies) : 0;
      for (int h = rows.first; h < rows.last; ++h) {
        const Piece row{t, h, 0, 0};
        const T* x = row_of<T>(stage, row, stage.x, 0, b, channel);
        const T* grad = row_of<T>(stage, row, stage.grad, stage.num_halo, b, channel);
        each_gradient<4, T, A, kVec>(x, grad, columns.first, columns.last, 1, channels, num_copies, frame, each);
      }
    }
  }
};

// A block takes neighbours in one row of the latent. Each pixel's sums make the gradients of its shift, the sum of d,
// and of its scale, that of d * GroupNorm(x); `partials` gets the sums of d * scale and d * scale * (x - mean).
template <class T, class A, int kVec> __global__ void __launch_bounds__(kThreads, 1) sums_kernel(Stage stage) {
  const Place<kVec> place(stage);
  const int64_t b = blockIdx.z, channels = stage.channels, of_row = blocks_of_row(stage), line = blockIdx.x / of_row;
  const int64_t first = blockIdx.x % of_row * columns_of_block(stage), end = first + columns_of_block(stage);
  const int last = static_cast<int>(end < stage.latent_width ? end : stage.latent_width);
  A sum_d[kVec], sum_d_x[kVec];
#pragma unroll
  for (int k = 0; k < kVec; ++k) sum_d[k] = sum_d_x[k] = 0;
  if (place.is_inside) {
    const Channels<kVec, A> of(stage, b, place.channel);
    const Range frames = frames_of(stage, static_cast<int>(line / stage.latent_height));
    const Range rows = pixels_of(stage.height, stage.latent_height, static_cast<int>(line % stage.latent_height));
    const int64_t row = (b * stage.latent_frames * stage.latent_height + line) * stage.latent_width;
#pragma unroll 1
    for (int j = static_cast<int>(first) + place.pixel; j < last; j += pixels_at_once<kVec>(stage)) {
      const int64_t at = (row + j) * 2 * channels + place.channel;
      A scale[kVec], shift[kVec], of_scale[kVec];
      load_widened(reinterpret_cast<const T*>(stage.latent) + at, scale);
      load_widened(reinterpret_cast<const T*>(stage.latent) + at + channels, shift);
      PixelSums<T, A, kVec> sums;
      sums.add(stage, of, b, place.channel, frames, rows, pixels_of(stage.width, stage.latent_width, j), scale, shift);
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        of_scale[k] = sums.d_x[k] * of.factor[k] + sums.d[k] * of.offset[k];
        sum_d[k] += product(sums.d[k], scale[k]);
        sum_d_x[k] += product(sums.d_x[k], scale[k]);
      }
      store_vector(reinterpret_cast<A*>(stage.grad_latent) + at, of_scale);
      store_vector(reinterpret_cast<A*>(stage.grad_latent) + at + channels, sums.d);
    }
  }
  double* partials = stage.partials + (b * gridDim.x + blockIdx.x) * 2 * channels;
  add_pixels(stage, place, sum_d, sum_d_x, [=](int channel, double d, double d_x) {
    partials[channel] = d;
    partials[channels + channel] = d_x;
  });
}

struct Sums {
  template <class T, int kVec> const char* operator()(const Stage& stage, cudaStream_t stream) const {
    const dim3 grid = grid_of<kVec>(stage, stage.latent_frames * stage.latent_height * blocks_of_row(stage));
    return in_arithmetic<T>(stage, [&](auto zero) {
      using A = decltype(zero);
      return launch<sums_kernel<T, A, kVec>>(grid, kThreads, kSumsBytes<kVec, A>, stream, stage);
    });
  }
};

}  // namespace

const char* apply_cuda(const Stage& stage, int device, uintptr_t stream) {
  return run(stage, device, stream, Apply<true>{});
}
const char* sums_cuda(const Stage& stage, int device, uintptr_t stream) {
  return run(stage, device, stream, Sums{});
}
const char* gradient_cuda(const Stage& stage, int device, uintptr_t stream) {
  return run(stage, device, stream, Gradient<true>{});
}

}  // namespace cogvx::spatial_norm_silu
