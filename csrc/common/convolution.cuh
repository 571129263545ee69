// Convolution as an implicit matrix product. A block makes 8 x 16 pixels of a frame by some output channels. What its
// taps read of one input frame, 32 channels of the pixels and their border, lies in shared memory once for all taps of
// that frame; the weights stream past, tap by tap. The sums of a pixel have one order wherever in a tile it falls, so
// that a clip in chunks is bit for bit the clip in one.
#pragma once

#include "common/convolution.h"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace cogvx {
namespace {
namespace convolution {

constexpr int kRows = 8, kColumns = 16, kPixels = kRows * kColumns;  // of a tile; 16 pixels are the rows of a product
constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kDepth = kConvolutionDepth, kRowBytes = kDepth * 2;
constexpr int kStages = 4;                 // of weights
constexpr int kMaxShared = 99 << 10;       // what every GPU from sm_80 on gives a block

struct Shape {
  int rows, columns, bytes;  // of the patch of input pixels
  int ahead;                 // patches that are on their way: enough that each has kStages - 1 taps to land
};

inline __host__ __device__ Shape patch_of(const Convolution& args) {
  Shape patch;
  patch.rows = kRows + static_cast<int>(args.taps_h) - 1;
  patch.columns = kColumns + static_cast<int>(args.taps_w) - 1;
  patch.bytes = (patch.rows * patch.columns * kRowBytes + 127) / 128 * 128;
  const int taps = static_cast<int>(args.taps_h * args.taps_w);
  patch.ahead = (kStages - 1 + taps - 1) / taps;
  return patch;
}

// Where 16 bytes of a row of 64 lie: any eight rows that follow one another use all banks once.
inline __device__ int swizzled(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row >> 1 & 3)) << 4); }

// The same where rows are of kBytes, 64 or a multiple of 128.
template <int kBytes> __device__ int swizzled_in(int row, int chunk) {
  return kBytes == kRowBytes ? swizzled(row, chunk) : row * kBytes + ((chunk ^ (row & 7)) << 4);
}

template <class T, int kBlock> struct Block {
  static constexpr int kWarpsN = kBlock / 64 > 0 ? kBlock / 64 : 1, kWarpsM = kWarps / kWarpsN;
  static constexpr int kTilesM = kRows / kWarpsM, kTilesN = kBlock / kWarpsN / 8;  // of a warp
  static constexpr int kStageBytes = kBlock * kRowBytes;

  const Convolution& args;
  const Shape patch;
  char* const patches;
  char* const weights;
  const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 % kWarpsM, warp_n = threadIdx.x / 32 / kWarpsM;
  const int chunks, taps, phases_in;
  int64_t b, t;
  int row, column, tile_n, phase;  // of the tile
  int first_tap_t, num_groups, num_steps;
  const T* weight;

  float sums[kTilesM][kTilesN][4] = {};
  uint32_t pixels[2][kTilesM][4], factors[2][kTilesN][2];  // of two products of depth 16, by turns

  __device__ explicit Block(const Convolution& a)
      : args(a),
        patch(patch_of(a)),
        patches(shared_memory()),
        weights(patches + (patch.ahead + 1) * patch.bytes),
        chunks(static_cast<int>((a.channels + kDepth - 1) / kDepth)),
        taps(static_cast<int>(a.taps_h * a.taps_w)),
        phases_in(a.gathered ? 4 : 1) {
    const int tiles_n = static_cast<int>((a.channels_out + kBlock - 1) / kBlock), phases = a.spread ? 4 : 1;
    const int columns = static_cast<int>((a.width + kColumns - 1) / kColumns);
    const int rows = static_cast<int>((a.height + kRows - 1) / kRows);
    unsigned i = blockIdx.x;  // neighbours share pixels
    tile_n = i % tiles_n, i /= tiles_n;
    phase = i % phases, i /= phases;
    column = i % columns * kColumns, i /= columns;
    row = i % rows * kRows, i /= rows;
    t = i % a.frames_out, b = i / a.frames_out;
    const int64_t least = a.pad_t - t, most = a.frames_in + a.pad_t - t;
    first_tap_t = static_cast<int>(least > 0 ? least : 0);
    num_groups = (static_cast<int>(most < a.taps_t ? most : a.taps_t) - first_tap_t) * phases_in * chunks;
    num_steps = num_groups * taps;
    const int64_t steps = a.taps_t * phases_in * chunks * taps, tile = phase * tiles_n + tile_n;
    const int64_t skipped = static_cast<int64_t>(first_tap_t) * phases_in * chunks * taps;
    weight = reinterpret_cast<const T*>(a.weight) + (tile * steps + skipped) * (kBlock * kDepth);
  }

  // Copies what the taps of a group read: 32 channels of one phase of one frame, zeros outside.
  __device__ void fetch_patch(int group) {
    if (group >= num_groups) return;
    char* to = patches + group % (patch.ahead + 1) * patch.bytes;
    const int c = group % chunks * kDepth, from_phase = group / chunks % phases_in;
    const int64_t frame = b * args.frames_in + t + first_tap_t + group / (chunks * phases_in) - args.pad_t;
    const int p = args.spread ? 1 - phase / 2 : from_phase / 2, q = args.spread ? 1 - phase % 2 : from_phase % 2;
    const bool phased = args.spread || args.gathered;
    const int top = row - (phased ? p : static_cast<int>(args.taps_h) / 2);
    const int left = column - (phased ? q : static_cast<int>(args.taps_w) / 2);
    const int step = args.gathered ? 2 : 1, away_h = args.gathered ? p : 0, away_w = args.gathered ? q : 0;
    const T* x = reinterpret_cast<const T*>(args.x);
    for (int i = threadIdx.x; i < patch.rows * patch.columns * 4; i += kThreads) {
      const int pixel = i / 4, chunk = i % 4, r = top + pixel / patch.columns, s = left + pixel % patch.columns;
      const int channel = c + chunk * 8;
      const bool inside = r >= 0 && r < args.height && s >= 0 && s < args.width && channel < args.channels;
      const int64_t place = (frame * args.height * step + r * step + away_h) * args.width * step + s * step + away_w;
      copy_async<16>(to + swizzled(pixel, chunk), inside ? x + place * args.channels + channel : x, inside);
    }
  }

  __device__ void fetch_weights(int step) {
    if (step >= num_steps) return;
    char* to = weights + step % kStages * kStageBytes;
    const T* from = weight + static_cast<int64_t>(step) * (kBlock * kDepth);
#pragma unroll
    for (int i = threadIdx.x; i < kBlock * 4; i += kThreads) copy_async<16>(to + swizzled(i / 4, i % 4), from + i * 8, true);
  }

  // The operands of a product of depth 16, the first or the second of a tap's 32 channels.
  __device__ void load(int half, int step, int group, int tap) {
    const int taps_w = static_cast<int>(args.taps_w), tap_h = tap / taps_w, tap_w = tap - tap_h * taps_w;
    const char* from = patches + group % (patch.ahead + 1) * patch.bytes;
    const int first = (warp_m * kTilesM + tap_h) * patch.columns + tap_w + lane % 16;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
      load_matrices(pixels[half][m], from + swizzled(first + m * patch.columns, half * 2 + lane / 16));
    const char* of = weights + step % kStages * kStageBytes;
    const int n = warp_n * kTilesN * 8 + lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
      uint32_t both[4];
      load_matrices(both, of + swizzled(n + j * 8, half * 2 + lane / 8 % 2));
      factors[half][j][0] = both[0], factors[half][j][1] = both[1];
      factors[half][j + 1][0] = both[2], factors[half][j + 1][1] = both[3];
    }
  }

  __device__ void multiply(int half) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) multiply_add(sums[m][j], pixels[half][m], factors[half][j], T{});
  }

  __device__ void accumulate() {
    for (int step = 0; step < kStages; ++step) {
      if (step <= patch.ahead) fetch_patch(step);
      fetch_weights(step);
      commit_copies();
    }
    wait_for_copies<kStages - 1>();
    __syncthreads();
    load(0, 0, 0, 0);
    int group = 0, tap = 0;
    for (int step = 0; step < num_steps; ++step) {
      load(1, step, group, tap);
      multiply(0);
      if (step + 1 < num_steps) {
        if (++tap == taps) tap = 0, ++group;
        wait_for_copies<kStages - 2>();
        __syncthreads();  // the next tap is there, and this one's operands are in registers
        fetch_weights(step + kStages);
        if (tap == 0) fetch_patch(group + patch.ahead);
        commit_copies();
        load(0, step + 1, group, tap);
      }
      multiply(1);
    }
  }

  // Adds the bias and lays the tile out in shared memory, so that the stores are of 16 bytes side by side.
  __device__ void stage() {
    wait_for_copies<0>();
    __syncthreads();
    const T* bias = reinterpret_cast<const T*>(args.bias);
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const int tile = warp_n * kTilesN + j;
      float added[2] = {0.0f, 0.0f};
      for (int k = 0; k < 2; ++k) {
        const int64_t n = static_cast<int64_t>(tile_n) * kBlock + tile * 8 + lane % 4 * 2 + k;
        if (bias && n < args.channels_out) added[k] = to_accumulator(bias[n]);
      }
#pragma unroll
      for (int m = 0; m < kTilesM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pixel = (warp_m * kTilesM + m) * kColumns + lane / 4 + half * 8;
          Vec<T, 2> pair;
          for (int k = 0; k < 2; ++k) pair.v[k] = from_accumulator<T>(sums[m][j][half * 2 + k] + added[k]);
          char* to = patches + swizzled_in<kBlock * 2>(pixel, tile) + lane % 4 * 4;
          *reinterpret_cast<Vec<T, 2>*>(to) = pair;
        }
    }
    __syncthreads();
  }

  __device__ void store_vector(T* to, const Vec<T, 8>& values, int64_t n) const {
    if (args.channels_out % 8 == 0) {
      *reinterpret_cast<Vec<T, 8>*>(to) = values;
    } else {
      for (int k = 0; k < 8 && n + k < args.channels_out; ++k) to[k] = values.v[k];
    }
  }

  __device__ void store() const {
    const int step = args.spread ? 2 : 1, p = args.spread ? phase / 2 : 0, q = args.spread ? phase % 2 : 0;
    const int64_t alone = args.frames_out % 2, frames = args.repeated ? 2 * args.frames_out - alone : args.frames_out;
    const int64_t frame = b * frames + (args.repeated ? 2 * t + 1 - alone : t);
    const bool twice = args.repeated && t >= alone;
    const int64_t size = args.height * args.width * step * step;
    T* y = reinterpret_cast<T*>(args.y);
    constexpr int kVectors = kBlock / 8;
    for (int i = threadIdx.x; i < kPixels * kVectors; i += kThreads) {
      const int pixel = i / kVectors, chunk = i % kVectors, r = row + pixel / kColumns, s = column + pixel % kColumns;
      const int64_t n = static_cast<int64_t>(tile_n) * kBlock + chunk * 8;
      if (r >= args.height || s >= args.width || n >= args.channels_out) continue;
      const auto values = *reinterpret_cast<const Vec<T, 8>*>(patches + swizzled_in<kBlock * 2>(pixel, chunk));
      const int64_t place = frame * size + (static_cast<int64_t>(r) * step + p) * args.width * step + s * step + q;
      store_vector(y + place * args.channels_out + n, values, n);
      if (twice) store_vector(y + (place - size) * args.channels_out + n, values, n);
    }
  }
};

template <class T, int kBlock> __global__ void __launch_bounds__(kThreads, 2) kernel(Convolution args) {
  Block<T, kBlock> block(args);
  block.accumulate();
  block.stage();
  block.store();
}

inline int64_t num_blocks(const Convolution& args) {
  const int64_t tiles = (args.channels_out + args.block - 1) / args.block * (args.spread ? 4 : 1);
  const int64_t patches = (args.height + kRows - 1) / kRows * ((args.width + kColumns - 1) / kColumns);
  return args.batch * args.frames_out * patches * tiles;
}

template <class T, int kBlock> const char* launch_block(const Convolution& args, int64_t blocks, cudaStream_t stream) {
  const Shape patch = patch_of(args);
  const int64_t input = (patch.ahead + 1) * patch.bytes + kStages * kBlock * kRowBytes, output = kPixels * kBlock * 2;
  const int64_t bytes = input > output ? input : output;
  if (bytes > kMaxShared) return "the taps of a frame are too many for shared memory";
  return launch<kernel<T, kBlock>>(static_cast<unsigned>(blocks), kThreads, bytes, stream, args);
}

template <class T> const char* launch_as(const Convolution& args, cudaStream_t stream) {
  const int64_t blocks = num_blocks(args);
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff || args.height > 1 << 24 || args.width > 1 << 24) return "too many pixels";
  if (args.channels % 8) return "the channels must be a multiple of 8";
  if (args.block == kConvolutionBlocks[0]) return launch_block<T, kConvolutionBlocks[0]>(args, blocks, stream);
  if (args.block == kConvolutionBlocks[1]) return launch_block<T, kConvolutionBlocks[1]>(args, blocks, stream);
  return "a tile that is not compiled";
}

}  // namespace convolution

inline const char* convolve(const Convolution& args, int device, uintptr_t stream_address) {
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  if (args.dtype == DType::float16) return convolution::launch_as<__half>(args, stream);
  if (args.dtype == DType::bfloat16) return convolution::launch_as<__nv_bfloat16>(args, stream);
  return "a dtype that is not compiled";
}

}  // namespace
}  // namespace cogvx
