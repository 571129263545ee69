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
  const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 % kWarpsM, warp_n = threadIdx.x / 32 / kWarpsM;
  int first_m, first_n, tap, away_t, away_h, away_w;
  // What the copies are at, the next patch; and the stages of the copies and of the products.
  int t, row, column, patches_left, next_stage = 0, stage = 0;
  int64_t b;

  float sums[kTilesM][kTilesN][4] = {};
  uint32_t lefts[2][kTilesM][4], rights[2][kTilesN][2];  // of two products of depth 16, by turns

  __device__ explicit WeightBlock(const WeightGradient& a) : args(a) {
    const int tiles_m = (a.channels_left + kM - 1) / kM, tiles_n = (a.channels_right + kN - 1) / kN;
    int i = blockIdx.x;  // neighbours share pixels
    first_m = i % tiles_m * kM, i /= tiles_m;
    first_n = i % tiles_n * kN, i /= tiles_n;
    tap = i;
    away_t = tap / (a.taps_h * a.taps_w);
    away_h = tap / a.taps_w % a.taps_h - a.pad_h;
    away_w = tap % a.taps_w - a.pad_w;
    const int64_t columns = (a.width + kPatchColumns - 1) / kPatchColumns;
    const int64_t rows = (a.height + kPatchRows - 1) / kPatchRows;
    const int64_t first = static_cast<int64_t>(blockIdx.y) * a.patches_a_split;
    const int64_t left = a.batch * a.frames * rows * columns - first;
    patches_left = left < a.patches_a_split ? static_cast<int>(left) : a.patches_a_split;
    column = static_cast<int>(first % columns) * kPatchColumns;
    row = static_cast<int>(first / columns % rows) * kPatchRows;
    t = static_cast<int>(first / columns / rows % a.frames);
    b = first / columns / rows / a.frames;
  }

  __device__ void fetch() {
    if (patches_left) {
      --patches_left;
      char* to = shared_memory() + next_stage * kStageBytes;
      const int64_t frame = b * args.frames + t;
      fetch_channels<kM>(to, args.left, frame, args.height, args.width, 1, 0, 0, first_m, args.channels_left);
      fetch_channels<kN>(to + kLeftBytes, args.right, frame + b * (args.taps_t - 1) + away_t, args.height_right,
                         args.width_right, args.step, away_h, away_w, first_n, args.channels_right);
      next_stage = (next_stage + 1) % kStages;
      column += kPatchColumns;
      if (column >= args.width) column = 0, row += kPatchRows;
      if (row >= args.height) row = 0, ++t;
      if (t == args.frames) t = 0, ++b;
    }
    commit_copies();
  }

  // Of each pixel (r, s) of the patch the channels of (step r + away_r, step s + away_s), zeros outside.
  template <int kChannels>
  __device__ void fetch_channels(char* to, const char* source, int64_t frame, int height, int width, int step,
                                 int away_r, int away_s, int first, int channels) const {
    constexpr int kVectors = kChannels / 8, kStride = kThreads / kVectors;  // pixels that are copied at once
    static_assert(kStride % 8 == 0 && kPatch % kStride == 0, "the swizzle stays");
    const int own = static_cast<int>(threadIdx.x) / kVectors, chunk = threadIdx.x % kVectors;
    const int c = first + chunk * 8;
    const T* x = reinterpret_cast<const T*>(source) + frame * height * width * channels;
    char* target = to + swizzled<kChannels * 2>(own, chunk);
#pragma unroll
    for (int i = 0; i < kPatch / kStride; ++i) {
      const int pixel = own + i * kStride, r = row + pixel / kPatchColumns, s = column + pixel % kPatchColumns;
      const int y = r * step + away_r, z = s * step + away_s;
      const bool inside = r < args.height && s < args.width && c < channels &&  //
                          y >= 0 && y < height && z >= 0 && z < width;
      copy_async<16>(target + i * (kStride * kChannels * 2), inside ? x + (y * width + z) * channels + c : x, inside);
    }
  }

  // The operands of a product of depth 16, the first or the second half of a patch; both lie with pixels as rows.
  template <int kWhich> __device__ void load() {
    const char* left = shared_memory() + stage * kStageBytes + kWhich * (16 * kM * 2);
    const char* right = shared_memory() + stage * kStageBytes + kLeftBytes + kWhich * (16 * kN * 2);
    const int high = lane / 16, low = lane / 8 % 2;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
      load_matrices_transposed(lefts[kWhich][m],
                               left + swizzled<kM * 2>(high * 8 + lane % 8, (warp_m * kTilesM + m) * 2 + low));
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
      uint32_t both[4];
      load_matrices_transposed(both, right + swizzled<kN * 2>(low * 8 + lane % 8, warp_n * kTilesN + j + high));
      rights[kWhich][j][0] = both[0], rights[kWhich][j][1] = both[1];
      rights[kWhich][j + 1][0] = both[2], rights[kWhich][j + 1][1] = both[3];
    }
  }

  template <int kWhich> __device__ void multiply() {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) multiply_add(sums[m][j], lefts[kWhich][m], rights[kWhich][j], T{});
  }

  __device__ void accumulate() {
    const int num_steps = patches_left;
    for (int i = 0; i < kStages; ++i) fetch();
    wait_for_copies<kStages - 1>();
    __syncthreads();
    load<0>();
    for (int step = 0; step < num_steps; ++step) {
      load<1>();
      multiply<0>();
      if (step + 1 < num_steps) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // the next patch is there, and this one's operands are in registers
        fetch();
        stage = (stage + 1) % kStages;
        load<0>();
      }
      multiply<1>();
    }
    wait_for_copies<0>();
  }

  __device__ void store() const {
    const int64_t taps = args.taps_t * args.taps_h * args.taps_w;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = first_m + (warp_m * kTilesM + i) * 16 + half * 8 + lane / 4;
        const int64_t split_m = static_cast<int64_t>(blockIdx.y) * args.channels_left + m;
        float* to = args.partials + (split_m * taps + tap) * args.channels_right;
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
          const int n = first_n + (warp_n * kTilesN + j) * 8 + lane % 4 * 2;
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
  const int64_t tiles_m = (args.channels_left + kM - 1) / kM, tiles_n = (args.channels_right + kN - 1) / kN;
  const int64_t blocks = tiles_m * tiles_n * args.taps_t * args.taps_h * args.taps_w;
  if (blocks == 0 || args.num_splits == 0) return nullptr;
  if (blocks > 0x7fffffff || args.num_splits > 0xffff) return "too many blocks";
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(args.num_splits));
  return launch<weight_kernel<T, kM, kN>>(grid, kThreads, kStages * WeightBlock<T, kM, kN>::kStageBytes, stream, args);
}

template <class T> const char* launch_weight_as(const WeightGradient& args, cudaStream_t stream) {
  constexpr int kWide = kConvolutionBlocks[0], kNarrow = kConvolutionBlocks[1];
  if (args.channels_left % 8 || args.channels_right % 8) return "the channels must be multiples of 8";
  const int64_t left = static_cast<int64_t>(args.height) * args.width * args.channels_left;
  const int64_t right = static_cast<int64_t>(args.height_right) * args.width_right * args.channels_right;
  if (max(left, right) > 0x7fffffff) return "the frames are too large";
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
