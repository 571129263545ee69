// A block owns 128 queries of a head and visits the keys and values of their sample, 64 at a time, copied three tiles
// deep; scores and weights stay in registers, where a product leaves them as the next one takes them.
#include "joint_attention/owner.cuh"
#include "joint_attention/softmax.cuh"

namespace cogvx::joint_attention {
namespace {

template <int kWidth> struct Sizes {
  static constexpr int kKeys = 64, kStages = 3;
  static constexpr int kBlocks = kWidth <= 64 ? 2 : 1;  // of 16 queries a warp: as many as registers hold
  static constexpr int kThreads = kOwned / (16 * kBlocks) * 32;
  static constexpr int kTile = kKeys * kWidth;      // numbers
  static constexpr int kBytes = kStages * 2 * kTile * 2;
  static_assert(kOwned * kWidth <= 2 * kTile);  // queries lie where later a stage does
};

template <class T, int kWidth, bool kWithLse>
__global__ void __launch_bounds__(Sizes<kWidth>::kThreads, kWidth <= 64 ? 2 : 1) forward_kernel(Args args) {
  using S = Sizes<kWidth>;
  constexpr int kBlocks = S::kBlocks, kKeys = S::kKeys;
  T* const shared = reinterpret_cast<T*>(shared_memory());
  const auto keys = [&](int stage) { return Tile<T, kWidth>{shared + 2 * stage * S::kTile}; };
  const auto values = [&](int stage) { return Tile<T, kWidth>{shared + (2 * stage + 1) * S::kTile}; };
  const Owner owner = owner_of(args);
  const int width = static_cast<int>(args.width), row = threadIdx.x / 32 * (16 * kBlocks);  // the warp's first

  Reader<T, kWidth, kOwned, S::kThreads> q(owner.head(args.q), args.q.stride_n, owner.row, owner.end, width);
  Reader<T, kWidth, kKeys, S::kThreads> k(owner.head(args.k), args.k.stride_n, owner.start, owner.end, width);
  Reader<T, kWidth, kKeys, S::kThreads> v(owner.head(args.v), args.v.stride_n, owner.start, owner.end, width);
  const auto start = [&](int stage) {
    k.start(keys(stage));
    v.start(values(stage));
  };
  q.start(keys(S::kStages - 1));
  commit_copies();
  const Pipeline<S::kStages> pipeline{(owner.end - owner.start + kKeys - 1) / kKeys};
  pipeline.prefetch(start);
  wait_for_copies<S::kStages - 1>();
  __syncthreads();
  const InRegisters<T, kBlocks, kWidth> queries(keys(S::kStages - 1), row);

  Sums<kBlocks, kWidth> sums;
  clear<kBlocks, kWidth>(sums);
  Softmax<T, kBlocks, kWithLse> softmax;  // a logarithm is not rounded to T
  const float scale = 1.0f / sqrtf(static_cast<float>(width)), bits = kBits / sqrtf(static_cast<float>(width));
  pipeline.run(start, [&](int stage, int step) {
    Sums<kBlocks, kKeys> scores;
    multiply_by_rows<kBlocks, kKeys>(scores, queries, keys(stage), 0);
    mask<kBlocks, kKeys>(scores, owner.start + step * kKeys, owner.end);
    softmax.template weigh<kKeys, kWidth>(scores, sums, bits);
    add_weighted<kBlocks, kKeys>(sums, scores, values(stage), 0);
  });

  if (kWithLse) {
    float* const lse = reinterpret_cast<float*>(args.lse) + (owner.b * args.num_heads + owner.a) * args.num_tokens;
    softmax.store_logarithms(lse + owner.row + row, owner.end - owner.row - row, bits, scale);
  }
  float factors[kBlocks][2];
  softmax.inverse_totals(factors);
  store_rows<kBlocks>(sums, factors, keys(0), row, owner.at<T>(args.y, owner.row + row), args.y.stride_n,
                      owner.end - owner.row - row, width);
}

template <class T, int kWidth> struct Forward {
  static const char* run(const Args& args, unsigned blocks, cudaStream_t stream) {
    using S = Sizes<kWidth>;
    return args.lse ? launch<forward_kernel<T, kWidth, true>>(blocks, S::kThreads, S::kBytes, stream, args)
                    : launch<forward_kernel<T, kWidth, false>>(blocks, S::kThreads, S::kBytes, stream, args);
  }
};

}  // namespace

const char* forward_cuda(const Args& args, int device, uintptr_t stream) {
  return launch_for<Forward>(args, device, stream);
}

}  // namespace cogvx::joint_attention
