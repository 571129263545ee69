// The gradient of a convolution's weight as a matrix product whose depth is the pixels. A block makes one tap of some
// left by some right channels, from one split of the pixels; the splits are added up by the caller, in their order.
#pragma once

#include "common/convolution.cuh"

namespace cogvx {
namespace {
namespace convolution {

constexpr int kPatchRows = kWeightPatch[0], kPatchColumns = kWeightPatch[1], kPatch = kPatchRows * kPatchColumns;

// kM left by kN right channels, each 128 or 32 and one of them 128.
template <class T, int kM, int kN> struct WeightBlock {
  static constexpr int kWarpsM = kM == kN ? 2 : kM / 32, kWarpsN = kWarps / kWarpsM;
  static constexpr int kTilesM = kM / kWarpsM / 16, kTilesN = kN / kWarpsN / 8;  // of a warp
  static constexpr int kLeftBytes = kPatch * kM * 2, kStageBytes = kLeftBytes + kPatch * kN * 2;

  const WeightGradient& args;
  char* const stages = shared_memory();
  const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 % kWarpsM, warp_n = threadIdx.x / 32 / kWarpsM;
  int64_t first_m, first_n;
  int tap, tap_t, away_h, away_w;
  int64_t frame;        // of the next patch to fetch: b * frames + t
  int row, column;      // of it
  int num_steps, fetched = 0;

  float sums[kTilesM][kTilesN][4] = {};
  uint32_t lefts[2][kTilesM][4], rights[2][kTilesN][2];  // of two products of depth 16, by turns

  __device__ explicit WeightBlock(const WeightGradient& a) : args(a) {
    const unsigned tiles_m = static_cast<unsigned>((a.channels_left + kM - 1) / kM);
    const unsigned tiles_n = static_cast<unsigned>((a.channels_right + kN - 1) / kN);
    unsigned i = blockIdx.x;  // neighbours share pixels
    first_m = static_cast<int64_t>(i % tiles_m) * kM, i /= tiles_m;
    first_n = static_cast<int64_t>(i % tiles_n) * kN, i /= tiles_n;
    tap = static_cast<int>(i);
    const int taps_h = static_cast<int>(a.taps_h), taps_w = static_cast<int>(a.taps_w);
    tap_t = tap / (taps_h * taps_w);
    away_h = tap / taps_w % taps_h - static_cast<int>(a.pad_h);
    away_w = tap % taps_w - static_cast<int>(a.pad_w);
    const int64_t columns = (a.width + kPatchColumns - 1) / kPatchColumns;
    const int64_t rows = (a.height + kPatchRows - 1) / kPatchRows;
    const int64_t first = blockIdx.y * a.patches_a_split, left = a.batch * a.frames * rows * columns - first;
    num_steps = static_cast<int>(left < a.patches_a_split ? left : a.patches_a_split);
    column = static_cast<int>(first % columns) * kPatchColumns;
    row = static_cast<int>(first / columns % rows) * kPatchRows;
    frame = first / columns / rows;
  }

  __device__ void fetch() {
    if (fetched < num_steps) {
      char* to = stages + fetched % kStages * kStageBytes;
      fetch_left(to);
      fetch_right(to + kLeftBytes);
      column += kPatchColumns;
      if (column >= args.width) column = 0, row += kPatchRows;
      if (row >= args.height) row = 0, ++frame;
      ++fetched;
    }
    commit_copies();
  }

  __device__ void fetch_left(char* to) const {
    const T* left = reinterpret_cast<const T*>(args.left);
#pragma unroll
    for (int i = threadIdx.x; i < kPatch * kM / 8; i += kThreads) {
      const int pixel = i / (kM / 8), chunk = i % (kM / 8);
      const int r = row + pixel / kPatchColumns, s = column + pixel % kPatchColumns;
      const int64_t m = first_m + chunk * 8;
      const bool inside = r < args.height && s < args.width && m < args.channels_left;
      const int64_t place = (frame * args.height + r) * args.width + s;
      copy_async<16>(to + swizzled_in<kM * 2>(pixel, chunk), inside ? left + place * args.channels_left + m : left, inside);
    }
  }

  __device__ void fetch_right(char* to) const {
    const T* right = reinterpret_cast<const T*>(args.right);
    const int step = static_cast<int>(args.step);
    const int64_t height = args.height * step, width = args.width * step;
    const int64_t from = frame + frame / args.frames * (args.taps_t - 1) + tap_t;
#pragma unroll
    for (int i = threadIdx.x; i < kPatch * kN / 8; i += kThreads) {
      const int pixel = i / (kN / 8), chunk = i % (kN / 8);
      const int r = row + pixel / kPatchColumns, s = column + pixel % kPatchColumns;
      const int y = r * step + away_h, x = s * step + away_w;
      const int64_t n = first_n + chunk * 8;
      const bool inside = r < args.height && s < args.width && y >= 0 && y < height && x >= 0 && x < width &&
                          n < args.channels_right;
      const int64_t place = (from * height + y) * width + x;
      copy_async<16>(to + swizzled_in<kN * 2>(pixel, chunk), inside ? right + place * args.channels_right + n : right,
                     inside);
    }
  }

  // The operands of a product of depth 16, the first or the second half of a patch; both lie with pixels as rows.
  __device__ void load(int half, int step) {
    const char* left = stages + step % kStages * kStageBytes;
    const char* right = left + kLeftBytes;
    const int high = lane / 16, low = lane / 8 % 2;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
      load_matrices_transposed(lefts[half][m], left + swizzled_in<kM * 2>(half * 16 + high * 8 + lane % 8,
                                                                          (warp_m * kTilesM + m) * 2 + low));
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
      uint32_t both[4];
      load_matrices_transposed(
          both, right + swizzled_in<kN * 2>(half * 16 + low * 8 + lane % 8, warp_n * kTilesN + j + high));
      rights[half][j][0] = both[0], rights[half][j][1] = both[1];
      rights[half][j + 1][0] = both[2], rights[half][j + 1][1] = both[3];
    }
  }

  __device__ void multiply(int half) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) multiply_add(sums[m][j], lefts[half][m], rights[half][j], T{});
  }

  __device__ void accumulate() {
    for (int step = 0; step < kStages; ++step) fetch();
    wait_for_copies<kStages - 1>();
    __syncthreads();
    load(0, 0);
    for (int step = 0; step < num_steps; ++step) {
      load(1, step);
      multiply(0);
      if (step + 1 < num_steps) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // the next patch is there, and this one's operands are in registers
        fetch();
        load(0, step + 1);
      }
      multiply(1);
    }
    wait_for_copies<0>();
  }

  __device__ void store() const {
    const int64_t taps = args.taps_t * args.taps_h * args.taps_w;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = first_m + (warp_m * kTilesM + i) * 16 + half * 8 + lane / 4;
        float* to = args.partials + ((blockIdx.y * args.channels_left + m) * taps + tap) * args.channels_right;
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
          const int64_t n = first_n + (warp_n * kTilesN + j) * 8 + lane % 4 * 2;
          if (m < args.channels_left && n < args.channels_right)
            *reinterpret_cast<float2*>(to + n) = make_float2(sums[i][j][half * 2], sums[i][j][half * 2 + 1]);
        }
      }
  }
};

template <class T, int kM, int kN> __global__ void __launch_bounds__(kThreads, 2) weight_kernel(WeightGradient args) {
  WeightBlock<T, kM, kN> block(args);
  block.accumulate();
  block.store();
}

template <class T, int kM, int kN> const char* launch_weight(const WeightGradient& args, cudaStream_t stream) {
  const int64_t tiles = (args.channels_left + kM - 1) / kM * ((args.channels_right + kN - 1) / kN);
  const int64_t blocks = tiles * args.taps_t * args.taps_h * args.taps_w;
  if (blocks == 0 || args.num_splits == 0) return nullptr;
  if (blocks > 0x7fffffff || args.num_splits > 0xffff) return "too many blocks";
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(args.num_splits));
  return launch<weight_kernel<T, kM, kN>>(grid, kThreads, kStages * WeightBlock<T, kM, kN>::kStageBytes, stream, args);
}

template <class T> const char* launch_weight_as(const WeightGradient& args, cudaStream_t stream) {
  constexpr int kWide = kConvolutionBlocks[0], kNarrow = kConvolutionBlocks[1];
  if (args.channels_left % 8 || args.channels_right % 8) return "the channels must be multiples of 8";
  if (args.height > 1 << 24 || args.width > 1 << 24) return "too many pixels";
  if (args.channels_left <= kNarrow) return launch_weight<T, kNarrow, kWide>(args, stream);
  if (args.channels_right <= kNarrow) return launch_weight<T, kWide, kNarrow>(args, stream);
  return launch_weight<T, kWide, kWide>(args, stream);
}

}  // namespace convolution

inline const char* weight_gradient(const WeightGradient& args, int device, uintptr_t stream_address) {
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  if (args.dtype == DType::float16) return convolution::launch_weight_as<__half>(args, stream);
  if (args.dtype == DType::bfloat16) return convolution::launch_weight_as<__nv_bfloat16>(args, stream);
  return "a dtype that is not compiled";
}

}  // namespace
}  // namespace cogvx
