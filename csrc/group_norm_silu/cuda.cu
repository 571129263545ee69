#include "group_norm_silu/pixels.cuh"

namespace cogvx::group_norm_silu {
namespace {

// Moments of every channel over one piece. Differences from some value of the channel: a large mean costs no accuracy.
template <class T, class A, int kVec> __global__ void __launch_bounds__(kThreads, 2) moments_kernel(Stage stage) {
  constexpr int kAhead = 4;  // pixels on their way together
  const Place<kVec> place(stage);
  const int64_t b = blockIdx.z, channels = stage.channels;
  const Piece piece = piece_at(stage, blockIdx.x, Grain::coarse);
  const T* first = row_of<T>(stage, piece, stage.x, 0, b, 0) + piece.first * channels;
  A shift[kVec], sum[kVec], squares[kVec];
#pragma unroll
  for (int k = 0; k < kVec; ++k) shift[k] = sum[k] = squares[k] = 0;
  if (place.is_inside) {
    const T* x = first + place.channel;
    const int step = pixels_at_once<kVec>(stage), count = piece.last - piece.first;
    const Vec<T, kVec> start = load_vector<T, kVec>(x);
#pragma unroll
    for (int k = 0; k < kVec; ++k) shift[k] = to_accumulator(start.v[k]);
#pragma unroll 1
    for (int pixel = place.pixel; pixel < count; pixel += kAhead * step) {
      Vec<T, kVec> values[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        values[i] = pixel + i * step < count ? load_vector<T, kVec>(x + (pixel + i * step) * channels) : start;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          const A d = to_accumulator(values[i].v[k]) - shift[k];
          sum[k] += d;
          squares[k] += d * d;
        }
      }
    }
  }
  const double count = piece.last - piece.first;
  double* moments = stage.moments + (b * gridDim.x + blockIdx.x) * 2 * channels;
  add_pixels(stage, place, sum, squares, [=](int channel, double total, double total_squares) {
    const double within = total_squares - total * total / count;
    moments[channel] = to_accumulator(first[channel]) + total / count;
    moments[channels + channel] = within > 0 ? within : 0;
  });
}

// The sum over the block, which every thread gets; in an order that never changes.
__device__ double sum_of_block(double value, double* shared) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  const double total = shared[0];
  __syncthreads();
  return total;
}

// The moments of one group of one sample, from those of its channels and pieces.
__global__ void __launch_bounds__(kThreads) finish_kernel(Stage stage) {
  double* shared = reinterpret_cast<double*>(shared_memory());
  const int64_t channels = stage.channels, width = channels / stage.num_groups, b = blockIdx.y;
  const int64_t pieces = num_pieces(stage, Grain::coarse), first = blockIdx.x * width;
  const double* moments = stage.moments + b * pieces * 2 * channels + first;
  const auto each = [&](auto f) {
    double total = 0;
    for (int64_t i = threadIdx.x; i < pieces * width; i += kThreads) {
      const Piece piece = piece_at(stage, i / width, Grain::coarse);
      const double* at = moments + i / width * 2 * channels + i % width;
      total += f(static_cast<double>(piece.last - piece.first), at[0], at[channels]);
    }
    return sum_of_block(total, shared);
  };
  const double count = static_cast<double>(width * stage.frames * stage.height * stage.width);
  const double mean = each([](double n, double m, double) { return n * m; }) / count;
  const double squares =
      each([mean](double n, double m, double within) { return within + n * (m - mean) * (m - mean); });
  const double rstd = 1.0 / sqrt(squares / count + stage.eps);
  for (int64_t c = threadIdx.x; c < width; c += kThreads) {
    stage.statistics[b * 2 * channels + first + c] = mean;
    stage.statistics[(b * 2 + 1) * channels + first + c] = rstd;
  }
}

// The same from mean and variance of each of the group's channels; a thread takes a group.
__global__ void __launch_bounds__(kThreads) groups_kernel(Stage stage) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, b = blockIdx.y;
  if (group >= stage.num_groups) return;
  const int64_t channels = stage.channels, width = channels / stage.num_groups, first = group * width;
  const float *means = stage.channel_moments + b * 2 * channels + first, *variances = means + channels;
  double mean = 0, variance = 0;
  for (int64_t c = 0; c < width; ++c) mean += means[c];
  mean /= static_cast<double>(width);
  for (int64_t c = 0; c < width; ++c) variance += variances[c] + (means[c] - mean) * (means[c] - mean);
  const double rstd = 1.0 / sqrt(variance / static_cast<double>(width) + stage.eps);
  for (int64_t c = first; c < first + width; ++c) {
    stage.statistics[b * 2 * channels + c] = mean;
    stage.statistics[(b * 2 + 1) * channels + c] = rstd;
  }
}

// Sums of d = dL/dv and of d * (x - mean) of every channel over one piece.
template <class T, class A, int kVec> __global__ void __launch_bounds__(kThreads, 2) sums_kernel(Stage stage) {
  const Place<kVec> place(stage);
  const int64_t b = blockIdx.z, frame = stage.height * stage.width * stage.channels;
  const int channels = static_cast<int>(stage.channels);
  const Piece piece = piece_at(stage, blockIdx.x, Grain::coarse);
  A sum_d[kVec], sum_d_x[kVec];
#pragma unroll
  for (int k = 0; k < kVec; ++k) sum_d[k] = sum_d_x[k] = 0;
  if (place.is_inside) {
    const Channels<kVec, A> of(stage, b, place.channel);
    const T* x = row_of<T>(stage, piece, stage.x, 0, b, place.channel);
    const T* grad = row_of<T>(stage, piece, stage.grad, stage.num_halo, b, place.channel);
    const int step = pixels_at_once<kVec>(stage);
    const int num_copies = piece.frame == 0 ? static_cast<int>(stage.num_copies) : 0;
    const auto add = [&](const Vec<T, kVec>& values, const A(&g)[kVec], int) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const A centered = A{to_accumulator(values.v[k])} - of.mean[k];
        const A d = product(g[k], silu_derivative<T>(centered * of.factor[k] + of.offset[k]));
        sum_d[k] += d;
        sum_d_x[k] += d * centered;
      }
    };
    const int start = piece.first + place.pixel;
    each_gradient<2, T, A, kVec>(x, grad, start, piece.last, step, channels, num_copies, frame, add);
  }
  double* partials = stage.partials + (b * gridDim.x + blockIdx.x) * 2 * channels;
  add_pixels(stage, place, sum_d, sum_d_x, [=](int channel, double d, double d_x) {
    partials[channel] = d;
    partials[channels + channel] = d_x;
  });
}

struct Moments {
  template <class T, int kVec> const char* operator()(const Stage& stage, cudaStream_t stream) const {
    if (stage.channel_moments) {
      const int64_t blocks = (stage.num_groups + kThreads - 1) / kThreads;
      const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(stage.batch));
      return launch<groups_kernel>(grid, kThreads, 0, stream, stage);
    }
    const dim3 grid = grid_of<kVec>(stage, num_pieces(stage, Grain::coarse));
    const char* error = in_arithmetic<T>(stage, [&](auto zero) {
      using A = decltype(zero);
      return launch<moments_kernel<T, A, kVec>>(grid, kThreads, kSumsBytes<kVec, A>, stream, stage);
    });
    if (error) return error;
    const dim3 groups(static_cast<unsigned>(stage.num_groups), static_cast<unsigned>(stage.batch));
    return launch<finish_kernel>(groups, kThreads, kThreads * sizeof(double), stream, stage);
  }
};

struct Sums {
  template <class T, int kVec> const char* operator()(const Stage& stage, cudaStream_t stream) const {
    const dim3 grid = grid_of<kVec>(stage, num_pieces(stage, Grain::coarse));
    return in_arithmetic<T>(stage, [&](auto zero) {
      using A = decltype(zero);
      return launch<sums_kernel<T, A, kVec>>(grid, kThreads, kSumsBytes<kVec, A>, stream, stage);
    });
  }
};

}  // namespace

const char* statistics_cuda(const Stage& stage, int device, uintptr_t stream) {
  return run(stage, device, stream, Moments{});
}
const char* apply_cuda(const Stage& stage, int device, uintptr_t stream) {
  return run(stage, device, stream, Apply<false>{});
}
const char* sums_cuda(const Stage& stage, int device, uintptr_t stream) {
  return run(stage, device, stream, Sums{});
}
const char* gradient_cuda(const Stage& stage, int device, uintptr_t stream) {
  return run(stage, device, stream, Gradient<false>{});
}

}  // namespace cogvx::group_norm_silu
