// First q and k are rounded to int8, a block a group; then joint_attention's forward pass with their products in int32.
#include "int8_joint_attention/int8_joint_attention.h"
#include "joint_attention/owner.cuh"
#include "joint_attention/softmax.cuh"

namespace cogvx::int8_joint_attention {
namespace {

using namespace joint_attention;
using Args = int8_joint_attention::Args;

constexpr float kSmallestPeak = 1e-30f;  // of a group: its scale has an inverse even where every value is zero
constexpr int kRoundingThreads = 256;

// The largest of a block, or NaN; `shared` has a float a warp.
__device__ inline float largest_of_block(float x, float* shared) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x = max_or_nan(x, __shfl_xor_sync(0xffffffffu, x, offset));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  for (int warp = 0; warp < kRoundingThreads / 32; ++warp) x = max_or_nan(x, shared[warp]);
  return x;
}

// Rounds a group of queries, or of keys less their mean.
template <class T, int kWidth, bool kIsKeys>
__global__ void __launch_bounds__(kRoundingThreads) round_kernel(Args args) {
  constexpr int kGroup = kIsKeys ? kKeys : kQueries, kPieces = kWidth / 8;
  constexpr int kStep = kRoundingThreads / kPieces, kEach = kGroup / kStep;
  const int num_tokens = static_cast<int>(args.num_tokens), num_groups = (num_tokens + kGroup - 1) / kGroup;
  const int64_t head = blockIdx.x / num_groups;
  const int group = blockIdx.x % num_groups, piece = threadIdx.x % kPieces;
  const Owner owner{head / args.num_heads, head % args.num_heads, group * kGroup, 0, num_tokens};
  const bool is_inside = piece * 8 < args.width;

  Vec<float, 8> mean{};
  if (kIsKeys && is_inside) mean = *reinterpret_cast<const Vec<float, 8>*>(args.mean + head * args.width + piece * 8);
  float x[kEach][8], largest = kSmallestPeak;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int token = owner.row + threadIdx.x / kPieces + i * kStep;
    Vec<T, 8> values{};
    const bool is_there = is_inside && token < num_tokens;
    const T* const from = owner.at<T>(kIsKeys ? args.k : args.q, token) + piece * 8;
    if (is_there) values = *reinterpret_cast<const Vec<T, 8>*>(from);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      x[i][c] = to_accumulator(values.v[c]) - (is_there ? mean.v[c] : 0.0f);
      largest = max_or_nan(largest, fabsf(x[i][c]));
    }
  }
  const float scale = largest_of_block(largest, reinterpret_cast<float*>(shared_memory())) * (1.0f / 127.0f);
  const float inverse = 1.0f / scale;
  int8_t* const to = (kIsKeys ? args.k8 : args.q8) + head * num_tokens * kWidth + piece * 8;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int token = owner.row + threadIdx.x / kPieces + i * kStep;
    Vec<int8_t, 8> values;
#pragma unroll
    for (int c = 0; c < 8; ++c) values.v[c] = static_cast<int8_t>(__float2int_rn(x[i][c] * inverse));
    if (token < num_tokens) *reinterpret_cast<Vec<int8_t, 8>*>(to + static_cast<int64_t>(token) * kWidth) = values;
  }
  if (threadIdx.x == 0) (kIsKeys ? args.k_scales : args.q_scales)[blockIdx.x] = scale;
}

template <int kWidth> struct Sizes {
  static constexpr int kStages = 3;
  static constexpr int kBlocks = kWidth <= 64 ? 2 : 1;  // of 16 queries a warp
  static constexpr int kThreads = kQueries / (16 * kBlocks) * 32;
  static_assert(kQueries == kOwned);
};

template <class T, int kWidth> struct Stage {
  static constexpr int kBytes = kKeys * kWidth * 3 + 128;
  char* data;
  __device__ Tile<int8_t, kWidth> queries() const { return {reinterpret_cast<int8_t*>(data)}; }  // before it is a stage
  __device__ Tile<int8_t, kWidth> keys() const { return {reinterpret_cast<int8_t*>(data)}; }
  __device__ Tile<T, kWidth> values() const { return {reinterpret_cast<T*>(data + kKeys * kWidth)}; }
  __device__ float* scale() const { return reinterpret_cast<float*>(data + kKeys * kWidth * 3); }
  __device__ Stage at(int stage) const { return {data + stage * kBytes}; }
  static_assert(kQueries * kWidth <= kBytes);
};

template <class T, int kWidth> __global__ void __launch_bounds__(Sizes<kWidth>::kThreads, kWidth <= 64 ? 2 : 1)
forward_kernel(Args args) {
  using S = Sizes<kWidth>;
  constexpr int kBlocks = S::kBlocks;
  constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: integers below 2^22 added to its bits are added to it
  const Stage<T, kWidth> stages{shared_memory()};
  const Owner owner = owner_of(args);
  const int width = static_cast<int>(args.width), row = threadIdx.x / 32 * (16 * kBlocks);  // the warp's first
  const int64_t head = owner.b * args.num_heads + owner.a, num_key_tiles = (args.num_tokens + kKeys - 1) / kKeys;

  const int64_t first = head * args.num_tokens * kWidth;
  const char *q8 = reinterpret_cast<const char*>(args.q8 + first), *k8 = reinterpret_cast<const char*>(args.k8 + first);
  Reader<int8_t, kWidth, kQueries, S::kThreads> q(q8, kWidth, owner.row, owner.end, kWidth);
  Reader<int8_t, kWidth, kKeys, S::kThreads> k(k8, kWidth, 0, owner.end, kWidth);
  Reader<T, kWidth, kKeys, S::kThreads> v(owner.head(args.v), args.v.stride_n, 0, owner.end, width);
  const float* scale = args.k_scales + head * num_key_tiles;
  const auto start = [&](int stage) {
    k.start(stages.at(stage).keys());
    v.start(stages.at(stage).values());
    if (threadIdx.x == 0) copy_async<4>(stages.at(stage).scale(), scale, true);
    ++scale;
  };
  q.start(stages.at(S::kStages - 1).queries());
  commit_copies();
  const Pipeline<S::kStages> pipeline{static_cast<int>(num_key_tiles)};
  pipeline.prefetch(start);
  wait_for_copies<S::kStages - 1>();
  __syncthreads();
  const InRegisters<int8_t, kBlocks, kWidth> queries(stages.at(S::kStages - 1).queries(), row);

  const float q_scale = args.q_scales[head * args.num_tiles + owner.row / kQueries];
  const float bits = q_scale * kBits / sqrtf(static_cast<float>(width));
  Sums<kBlocks, kWidth> sums;
  clear<kBlocks, kWidth>(sums);
  Softmax<T, kBlocks> softmax;
  pipeline.run(start, [&](int stage, int step) {
    int32_t products[kBlocks][kKeys / 8][4];
    multiply_by_rows<kBlocks, kKeys>(products, queries, stages.at(stage).keys(), 0, __float_as_int(kRounding));
    const float unit = bits * *stages.at(stage).scale();
    Sums<kBlocks, kKeys> scores;  // in bits; rounded as products, so that equal ones differ by nothing
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          scores[i][j][e] = __fmul_rn(__int_as_float(products[i][j][e]) - kRounding, unit);
    mask<kBlocks, kKeys>(scores, step * kKeys, owner.end);
    softmax.template weigh<kKeys, kWidth>(scores, sums, 1.0f);
    add_weighted<kBlocks, kKeys>(sums, scores, stages.at(stage).values(), 0);
  });

  float factors[kBlocks][2];
  softmax.inverse_totals(factors);
  store_rows<kBlocks>(sums, factors, Tile<T, kWidth>{reinterpret_cast<T*>(stages.data)}, row,
                      owner.at<T>(args.y, owner.row + row), args.y.stride_n, owner.end - owner.row - row, width);
}

template <class T, int kWidth> struct Forward {
  static const char* run(const Args& args, unsigned blocks, cudaStream_t stream) {
    using S = Sizes<kWidth>;
    constexpr int kShared = S::kStages * Stage<T, kWidth>::kBytes, kRoundingShared = kRoundingThreads / 32 * 4;
    static_assert(kQueries * kWidth * 2 <= kShared);
    const int64_t num_key_groups = (args.num_tokens + kKeys - 1) / kKeys * args.num_heads * args.batch;
    if (num_key_groups > 0x7fffffff) return "there are too many tokens or heads";
    const unsigned key_blocks = static_cast<unsigned>(num_key_groups);
    const char* error =
        launch<round_kernel<T, kWidth, false>>(blocks, kRoundingThreads, kRoundingShared, stream, args);
    if (!error)
      error = launch<round_kernel<T, kWidth, true>>(key_blocks, kRoundingThreads, kRoundingShared, stream, args);
    return error ? error : launch<forward_kernel<T, kWidth>>(blocks, S::kThreads, kShared, stream, args);
  }
};

}  // namespace

const char* forward_cuda(const Args& args, int device, uintptr_t stream) {
  return launch_for<Forward>(args, device, stream);
}

}  // namespace cogvx::int8_joint_attention
