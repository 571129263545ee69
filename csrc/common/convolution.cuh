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

constexpr int kRows = kConvolutionTile[0], kColumns = kConvolutionTile[1];  // 16 pixels are the rows of a product
constexpr int kPixels = kRows * kColumns;                                   // of a tile
constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kDepth = kConvolutionDepth, kRowBytes = kDepth * 2;
constexpr int kStages = 4;  // of weights
// Columns of a patch, with room for every border: a multiple of 8, so that rows that lie below each other are swizzled
// alike and the addresses of a warp's pixels differ by constants.
constexpr int kPitch = (kColumns + kConvolutionTaps - 1 + 7) / 8 * 8;
constexpr int kMaxShared = 99 << 10;  // what every GPU from sm_80 on gives a block

// Along an axis: how many taps a phase has, and which pixel the first of them reads, from the pixel's own.
struct Taps {
  int number, first;
};

template <class Sampling> __host__ __device__ Taps taps_of(int taps, int pad, int phase) {
  if (!Sampling::kSpread && !Sampling::kGathered) return {taps, -pad};
  const int least = (phase + pad) % 2, number = (taps + 1 - least) / 2;
  return {number, Sampling::kGathered ? (least - pad - phase) / 2 : (phase + pad - least) / 2 - number + 1};
}

// In shared memory: enough that each has kStages - 1 taps to land while those before it are at work.
struct Patches {
  int number, bytes;
};

template <class Sampling> __host__ __device__ Patches patches_of(const Convolution& args, int phase) {
  const int h = taps_of<Sampling>(args.taps_h, args.pad_h, phase / 2).number;
  const int w = taps_of<Sampling>(args.taps_w, args.pad_w, phase % 2).number;
  if (!Sampling::kGathered)
    return {1 + (kStages - 1 + h * w - 1) / (h * w), (kRows + h - 1) * kPitch * kRowBytes};
  // The phases of x by turns: h w, h other_w, other_h w, other_h other_w.
  const int other_h = args.taps_h - h, other_w = args.taps_w - w;
  const int one = min(h, other_h) * min(w, other_w);
  const int two = min(min(h, other_h) * args.taps_w, min(h * other_w + other_h * w, h * w + other_h * other_w));
  const int ahead = one >= kStages - 1 ? 1 : two >= kStages - 1 ? 2 : kStages - 1;
  return {1 + ahead, (kRows + max(h, other_h) - 1) * kPitch * kRowBytes};
}

// Of the rows or columns of y, or of those of one phase.
template <class Sampling> __host__ __device__ int tiles_along(int size, int of_a_tile) {
  return ((Sampling::kSpread ? (size + 1) / 2 : size) + of_a_tile - 1) / of_a_tile;
}

// Where 16 bytes of a row of kBytes lie, 64 or a multiple of 128: any eight rows that follow one another use all banks.
template <int kBytes> __device__ int swizzled(int row, int chunk) {
  return row * kBytes + ((kBytes == 64 ? chunk ^ (row >> 1 & 3) : chunk ^ (row & 7)) << 4);
}

template <class T, int kBlock, class Sampling> struct Block {
  static constexpr bool kSpread = Sampling::kSpread, kGathered = Sampling::kGathered;
  static constexpr int kWarpsN = kBlock / 64 > 0 ? kBlock / 64 : 1, kWarpsM = kWarps / kWarpsN;
  static constexpr int kTilesM = kRows / kWarpsM, kTilesN = kBlock / kWarpsN / 8;  // of a warp
  static constexpr int kStageBytes = kBlock * kRowBytes, kStep = kBlock * kDepth;
  static constexpr int kVectors = kBlock / 8;  // of a pixel's results
  static constexpr int kHalf = 32;  // flips the offset of a row's first 16 channels into that of its last

  const Convolution& args;
  const int channel_chunks;
  const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 % kWarpsM, warp_n = threadIdx.x / 32 / kWarpsM;
  int b, t, row, column, tile_n, phase;  // of the tile; row and column of its phase
  Patches patches;

  // What the copies are at: the next group, and the next tap of it.
  int next_t, next_phase = 0, next_chunk = 0, next_patch = 0, groups_left;  // of taps that read one patch
  const T* next_weight;
  int next_stage = 0, steps_left;
  // What the products are at.
  int tap_h = 0, tap_w = 0, group_phase = 0, patch = 0, stage = 0, pixel_offset, weight_offset;

  float sums[kTilesM][kTilesN][4] = {};
  uint32_t pixels[2][kTilesM][4], factors[2][kTilesN][2];  // of two products of depth 16, by turns

  __device__ explicit Block(const Convolution& a) : args(a), channel_chunks((a.channels + kDepth - 1) / kDepth) {
    const int tiles_n = (a.channels_out + kBlock - 1) / kBlock;
    const int columns = tiles_along<Sampling>(a.width, kColumns), rows = tiles_along<Sampling>(a.height, kRows);
    int i = blockIdx.x;  // neighbours share pixels
    tile_n = i % tiles_n, i /= tiles_n;
    phase = kSpread ? i % 4 : 0, i /= kSpread ? 4 : 1;
    column = i % columns * kColumns, i /= columns;
    row = i % rows * kRows, i /= rows;
    t = i % a.frames_out, b = i / a.frames_out;
    const int first = max(a.pad_t - t, 0), last = min(a.frames_in + a.pad_t - t, a.taps_t);  // taps inside the clip
    const int steps = channel_chunks * (kGathered ? a.taps_h * a.taps_w : taps_of_phase(phase));
    groups_left = (last - first) * channel_chunks * (kGathered ? 4 : 1);
    steps_left = (last - first) * steps;
    next_t = b * a.frames_in + t + first - a.pad_t;
    int64_t weights_before = (static_cast<int64_t>(tile_n) * a.taps_t + first) * steps;
    for (int p = 0; p < phase; ++p)
      weights_before += static_cast<int64_t>(tiles_n) * a.taps_t * channel_chunks * taps_of_phase(p);
    next_weight = reinterpret_cast<const T*>(a.weight) + weights_before * kStep + threadIdx.x * 8;
    patches = patches_of<Sampling>(a, phase);
    aim();
  }

  __device__ Taps taps_h(int of) const { return taps_of<Sampling>(args.taps_h, args.pad_h, of / 2); }
  __device__ Taps taps_w(int of) const { return taps_of<Sampling>(args.taps_w, args.pad_w, of % 2); }
  __device__ int taps_of_phase(int of) const { return taps_h(of).number * taps_w(of).number; }

  // Copies what the taps of the next group read: 32 channels of one phase of one frame, zeros outside.
  __device__ void fetch_patch() {
    if (groups_left == 0) return;
    --groups_left;
    const int of = kSpread ? phase : next_phase, p = kGathered ? of / 2 : 0, q = kGathered ? of % 2 : 0;
    const Taps h = taps_h(of), w = taps_w(of);
    const int step = kGathered ? 2 : 1, channel = next_chunk * kDepth + threadIdx.x % 4 * 8;
    int away_row = static_cast<int>(threadIdx.x) / 4 / kPitch, away = static_cast<int>(threadIdx.x) / 4 % kPitch;
    const int top = row + h.first, left = column + w.first;
    const int row_size = args.width_in * args.channels;
    const T* x = reinterpret_cast<const T*>(args.x) + static_cast<int64_t>(next_t) * args.height_in * row_size;
    char* to = shared_memory() + next_patch * patches.bytes + swizzled<kRowBytes>(threadIdx.x / 4, threadIdx.x % 4);
    while (away_row < kRows + h.number - 1) {
      const int r = (top + away_row) * step + p, s = (left + away) * step + q;
      const bool inside = r >= 0 && r < args.height_in && s >= 0 && s < args.width_in && channel < args.channels;
      const int place = r * row_size + s * args.channels + channel;
      if (away < kColumns + w.number - 1) copy_async<16>(to, x + (inside ? place : 0), inside);
      static_assert(kThreads / 4 % 8 == 0 && kThreads / 4 < 2 * kPitch, "the swizzle stays, and one carry is enough");
      to += kThreads / 4 * kRowBytes;
      away_row += kThreads / 4 / kPitch, away += kThreads / 4 % kPitch;
      if (away >= kPitch) away -= kPitch, ++away_row;
    }
    next_patch = next_patch + 1 == patches.number ? 0 : next_patch + 1;
    if (kGathered && ++next_phase < 4) return;
    next_phase = 0;
    if (++next_chunk < channel_chunks) return;
    next_chunk = 0, ++next_t;
  }

  __device__ void fetch_weights() {
    if (steps_left == 0) return;
    --steps_left;
    char* to = weights() + next_stage * kStageBytes + swizzled<kRowBytes>(threadIdx.x / 4, threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < kStageBytes / 16 / kThreads; ++i)
      copy_async<16>(to + i * (kThreads / 4 * kRowBytes), next_weight + i * kThreads * 8, true);
    next_weight += kStep;
    next_stage = (next_stage + 1) % kStages;
  }

  __device__ char* weights() const { return shared_memory() + patches.number * patches.bytes; }

  // Where this lane's operands of a tap begin.
  __device__ void aim() {
    const int first = (warp_m * kTilesM + tap_h) * kPitch + tap_w + lane % 16;
    pixel_offset = patch * patches.bytes + swizzled<kRowBytes>(first, lane / 16);
    const int n = warp_n * kTilesN * 8 + lane / 16 * 8 + lane % 8;
    weight_offset = stage * kStageBytes + swizzled<kRowBytes>(n, lane / 8 % 2);
  }

  // On to the next tap; whether it is the first of a group.
  __device__ bool advance() {
    stage = (stage + 1) % kStages;
    bool first = false;
    const int of = kSpread ? phase : group_phase;
    if (++tap_w == taps_w(of).number) {
      tap_w = 0;
      if (++tap_h == taps_h(of).number) {
        tap_h = 0, first = true;
        patch = patch + 1 == patches.number ? 0 : patch + 1;
        if (kGathered) group_phase = (group_phase + 1) % 4;
      }
    }
    aim();
    return first;
  }

  template <int kWhich> __device__ void load() {
    const char* from = shared_memory() + (pixel_offset ^ kWhich * kHalf);
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) load_matrices(pixels[kWhich][m], from + m * (kPitch * kRowBytes));
    const char* of = weights() + (weight_offset ^ kWhich * kHalf);
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
      uint32_t both[4];
      load_matrices(both, of + j * (8 * kRowBytes));
      factors[kWhich][j][0] = both[0], factors[kWhich][j][1] = both[1];
      factors[kWhich][j + 1][0] = both[2], factors[kWhich][j + 1][1] = both[3];
    }
  }

  template <int kWhich> __device__ void multiply() {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) multiply_add(sums[m][j], pixels[kWhich][m], factors[kWhich][j], T{});
  }

  __device__ void accumulate() {
    const int num_steps = steps_left;
    for (int i = 0; i < kStages; ++i) {
      if (i < patches.number) fetch_patch();
      fetch_weights();
      commit_copies();
    }
    wait_for_copies<kStages - 1>();
    __syncthreads();
    load<0>();
    const bool deep = args.channels > kDepth / 2;  // else the second product would be of zeros
    for (int step = 0; step < num_steps; ++step) {
      if (deep) load<1>();
      multiply<0>();
      if (step + 1 < num_steps) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // the next tap is there, and this one's operands are in registers
        fetch_weights();
        if (advance()) fetch_patch();
        commit_copies();
        load<0>();
      }
      if (deep) multiply<1>();
    }
  }

  // Brings what is added to the tile to where the tile will lie, 16 bytes side by side.
  __device__ void fetch_residual() const {
    const int channels = (args.channels_out + 7) / 8 * 8;
    const int64_t frame = static_cast<int64_t>(b) * args.frames_out + t;
    const T* from = reinterpret_cast<const T*>(args.residual) + frame * args.height * args.width * channels;
#pragma unroll 4
    for (int i = threadIdx.x; i < kPixels * kVectors; i += kThreads) {
      const int pixel = i / kVectors, chunk = i % kVectors, r = row + pixel / kColumns, s = column + pixel % kColumns;
      const int n = tile_n * kBlock + chunk * 8;
      const bool inside = r < args.height && s < args.width && n < channels;
      const int64_t place = inside ? static_cast<int64_t>(r * args.width + s) * channels + n : 0;
      copy_async<16>(shared_memory() + swizzled<kBlock * 2>(pixel, chunk), from + place, inside);
    }
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
  }

  // Adds bias and residual and lays the tile out in shared memory, so that the stores are of 16 bytes side by side.
  __device__ void lay_out() {
    wait_for_copies<0>();
    __syncthreads();
    const bool has_residual = !kSpread && args.residual;
    if (has_residual) fetch_residual();
    const T* bias = reinterpret_cast<const T*>(args.bias);
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const int tile = warp_n * kTilesN + j, n = tile_n * kBlock + tile * 8 + lane % 4 * 2;
      float added[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) added[k] = bias && n + k < args.channels_out ? to_accumulator(bias[n + k]) : 0.0f;
#pragma unroll
      for (int m = 0; m < kTilesM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pixel = (warp_m * kTilesM + m) * kColumns + lane / 4 + half * 8;
          char* to = shared_memory() + swizzled<kBlock * 2>(pixel, tile) + lane % 4 * 4;
          auto& pair = *reinterpret_cast<Vec<T, 2>*>(to);
          float value[2] = {sums[m][j][half * 2] + added[0], sums[m][j][half * 2 + 1] + added[1]};
          if (has_residual) value[0] += to_accumulator(pair.v[0]), value[1] += to_accumulator(pair.v[1]);
          pair = {from_accumulator<T>(value[0]), from_accumulator<T>(value[1])};
        }
    }
    __syncthreads();
  }

  // Of each channel of the tile, as it was rounded: its pixels inside the frame, their mean, their squared differences
  // from it. A thread takes a channel; its rows are summed side by side, so that no sum waits for the one before.
  __device__ void measure() const {
    const int rows = min(kRows, args.height - row), columns = min(kColumns, args.width - column);
    const int64_t frame = static_cast<int64_t>(b) * args.frames_out + t;
    const int64_t tile_row = frame * tiles_along<Sampling>(args.height, kRows) + row / kRows;
    const int64_t tile = tile_row * tiles_along<Sampling>(args.width, kColumns) + column / kColumns;
    const float count = static_cast<float>(rows * columns);
    for (int i = threadIdx.x; i < kBlock && tile_n * kBlock + i < args.channels_out; i += kThreads) {
      const auto total = [&](auto f) {
        float of_rows[kRows] = {};
        for (int s = 0; s < columns; ++s)
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const char* pixel = shared_memory() + swizzled<kBlock * 2>(r * kColumns + s, i / 8);
            const float y = to_accumulator(reinterpret_cast<const T*>(pixel)[i % 8]);
            if (r < rows) of_rows[r] += f(y);
          }
#pragma unroll
        for (int r = 1; r < kRows; ++r) of_rows[0] += of_rows[r];
        return of_rows[0];
      };
      const float mean = total([](float y) { return y; }) / count;
      float* to = args.moments + tile * 3 * args.channels_out + tile_n * kBlock + i;
      to[0] = count;
      to[args.channels_out] = mean;
      to[2 * args.channels_out] = total([mean](float y) { return (y - mean) * (y - mean); });
    }
  }

  __device__ void store_vector(T* to, const Vec<T, 8>& values, int n) const {
    if (args.channels_out % 8 == 0) {
      *reinterpret_cast<Vec<T, 8>*>(to) = values;
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (n + k < args.channels_out) to[k] = values.v[k];
    }
  }

  __device__ void store() const {
    const int alone = args.frames_out % 2;
    const int frames = args.repeated ? 2 * args.frames_out - alone : args.frames_out;
    const int64_t frame = static_cast<int64_t>(b) * frames + (args.repeated ? 2 * t + 1 - alone : t);
    const bool twice = args.repeated && t >= alone;
    const int64_t size = static_cast<int64_t>(args.height) * args.width;
#pragma unroll 4
    for (int i = threadIdx.x; i < kPixels * kVectors; i += kThreads) {
      const int pixel = i / kVectors, chunk = i % kVectors, n = tile_n * kBlock + chunk * 8;
      int r = row + pixel / kColumns, s = column + pixel % kColumns;
      if (kSpread) r = 2 * r + phase / 2, s = 2 * s + phase % 2;
      if (r >= args.height || s >= args.width || n >= args.channels_out) continue;
      const auto values = *reinterpret_cast<const Vec<T, 8>*>(shared_memory() + swizzled<kBlock * 2>(pixel, chunk));
      T* y = reinterpret_cast<T*>(args.y) + (frame * size + r * args.width + s) * args.channels_out + n;
      store_vector(y, values, n);
      if (twice) store_vector(y - size * args.channels_out, values, n);
    }
  }
};

template <class T, int kBlock, class Sampling>
__global__ void __launch_bounds__(kThreads, 2) kernel(Convolution args) {
  Block<T, kBlock, Sampling> block(args);
  block.accumulate();
  block.lay_out();
  if constexpr (Sampling::kMeasured) block.measure();
  block.store();
}

template <class T, int kBlock, class Sampling>
const char* launch_block(const Convolution& args, cudaStream_t stream) {
  constexpr int kPhases = Sampling::kSpread ? 4 : 1;
  const int64_t tiles_n = (args.channels_out + kBlock - 1) / kBlock;
  const int64_t tiles = tiles_along<Sampling>(args.height, kRows) * tiles_along<Sampling>(args.width, kColumns);
  const int64_t blocks = tiles * args.batch * args.frames_out * kPhases * tiles_n;
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "too many pixels";
  int bytes = kPixels * kBlock * 2;
  for (int phase = 0; phase < kPhases; ++phase) {
    const Patches patches = patches_of<Sampling>(args, phase);
    bytes = max(bytes, patches.number * patches.bytes + kStages * kBlock * kRowBytes);
  }
  if (bytes > kMaxShared) return "the taps of a frame are too many for shared memory";
  return launch<kernel<T, kBlock, Sampling>>(static_cast<unsigned>(blocks), kThreads, bytes, stream, args);
}

template <class T, class Sampling> const char* launch_as(const Convolution& args, cudaStream_t stream) {
  if (args.channels % 8) return "the channels must be a multiple of 8";
  constexpr int kLeast = Sampling::kSpread || Sampling::kGathered ? 2 : 1;  // a tap for each phase
  if (min(args.taps_h, args.taps_w) < kLeast) return "the taps of a frame are too few";
  if (max(args.taps_h, args.taps_w) > kConvolutionTaps) return "the taps of a frame are too many";
  const int64_t height = args.height_in + 4 * kConvolutionTaps, width = args.width_in + 4 * kConvolutionTaps;
  if (height * width * args.channels > 0x7fffffff) return "the frames are too large";
  if (static_cast<int64_t>(args.height) * args.width > 0x7fffffff) return "the frames are too large";
  if (args.block == kConvolutionBlocks[0]) return launch_block<T, kConvolutionBlocks[0], Sampling>(args, stream);
  if (args.block == kConvolutionBlocks[1]) return launch_block<T, kConvolutionBlocks[1], Sampling>(args, stream);
  return "a tile that is not compiled";
}

}  // namespace convolution

template <class Sampling> const char* convolve(const Convolution& args, int device, uintptr_t stream_address) {
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  if (args.dtype == DType::float16) return convolution::launch_as<__half, Sampling>(args, stream);
  if (args.dtype == DType::bfloat16) return convolution::launch_as<__nv_bfloat16, Sampling>(args, stream);
  return "a dtype that is not compiled";
}

}  // namespace
}  // namespace cogvx
