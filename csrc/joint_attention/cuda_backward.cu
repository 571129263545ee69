// The gradients, without a matrix of scores in memory. With p the weights and ds = p * (grad v^T - delta) / sqrt(E):
// grad_q = ds k, grad_k = ds^T q, grad_v = p^T grad. Two kernels, so that each sum has one owner: a block that owns
// queries visits keys and values, one that owns keys visits queries and the gradients of their results. What the
// logarithm of a row's sum passes on is p times its gradient, which is taken from delta.
#include <type_traits>

#include "joint_attention/owner.cuh"
#include "joint_attention/softmax.cuh"

namespace cogvx::joint_attention {
namespace {

template <int kWidth> struct Sizes {  // what fits into registers and 99 KiB of shared memory
  static constexpr bool kIsNarrow = kWidth <= 64;
  static constexpr int kBlocks = kIsNarrow ? 2 : 1;  // of 16 owned rows a warp
  static constexpr int kThreads = kOwned / (16 * kBlocks) * 32, kPerProcessor = kIsNarrow ? 2 : 1;
  static constexpr int kVisited = kIsNarrow ? 64 : 32;  // rows of a tile
  static constexpr int kColumns = 16;                   // scores a row that are in registers at once
  static constexpr int kStages = kIsNarrow ? 3 : 2;
  static constexpr int kOwnedBytes = kOwned * kWidth * 2;
};

// Two matrices' tiles and the statistics of their rows.
template <class T, int kWidth> struct Stage {
  static constexpr int kNumbers = Sizes<kWidth>::kVisited * kWidth;
  static constexpr int kBytes = 2 * kNumbers * 2 + Sizes<kWidth>::kVisited * 16;
  char* data;
  __device__ Tile<T, kWidth> first() const { return {reinterpret_cast<T*>(data)}; }
  __device__ Tile<T, kWidth> second() const { return {reinterpret_cast<T*>(data) + kNumbers}; }
  __device__ float4* statistics() const { return reinterpret_cast<float4*>(data + 2 * kNumbers * 2); }
  __device__ Stage at(int stage) const { return {data + stage * kBytes}; }
};

// A tile of owned rows; where it does not stay, stages lie there later.
template <class T, int kWidth> __device__ Tile<T, kWidth> owned(int i) {
  return {reinterpret_cast<T*>(shared_memory() + i * Sizes<kWidth>::kOwnedBytes)};
}

template <class T, int kWidth>
__device__ void start_owned(const Owner& owner, const Heads& x, int width, Tile<T, kWidth> to) {
  Reader<T, kWidth, kOwned, Sizes<kWidth>::kThreads>(owner.head(x), x.stride_n, owner.row, owner.end, width).start(to);
}

__device__ inline void land() {
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
}

// Visits the rows of two matrices in the owner's sample: visit(stage, first row). more(stage, first row) starts other
// copies.
template <class T, int kWidth, class More, class Visit>
__device__ void visit_all(const Owner& owner, const Heads& x, const Heads& y, int width, Stage<T, kWidth> stages,
                          More more, Visit visit) {
  constexpr int kVisited = Sizes<kWidth>::kVisited;
  using Visited = Reader<T, kWidth, kVisited, Sizes<kWidth>::kThreads>;
  Visited of_x(owner.head(x), x.stride_n, owner.start, owner.end, width);
  Visited of_y(owner.head(y), y.stride_n, owner.start, owner.end, width);
  int started = owner.start;
  const auto start = [&](int stage) {
    of_x.start(stages.at(stage).first());
    of_y.start(stages.at(stage).second());
    more(stages.at(stage), started);
    started += kVisited;
  };
  const Pipeline<Sizes<kWidth>::kStages> pipeline{(owner.end - owner.start + kVisited - 1) / kVisited};
  pipeline.prefetch(start);
  pipeline.run(start, [&](int stage, int step) { visit(stages.at(stage), owner.start + step * kVisited); });
}

// Of the rows of scores: the peak, and under it this lane's part of the sum of weights and of weights * (grad v^T).
template <int kBlocks> struct Statistics {
  float peaks[kBlocks][2], totals[kBlocks][2], deltas[kBlocks][2];

  __device__ Statistics() {
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      peaks[i / 2][i % 2] = -kInfinity;
      totals[i / 2][i % 2] = deltas[i / 2][i % 2] = 0.0f;
    }
  }

  template <int kColumns>
  __device__ void add(const Sums<kBlocks, kColumns>& scores, const Sums<kBlocks, kColumns>& of_weights, float bits) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = peaks[i][half];
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j)
          largest = max_or_nan(largest, max_or_nan(scores[i][j][2 * half], scores[i][j][2 * half + 1]));
        largest = largest_of_row(largest);
        const float decay = exp2_approximate((peaks[i][half] - finite(largest)) * bits);
        peaks[i][half] = largest;
        totals[i][half] *= decay;
        deltas[i][half] *= decay;
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            const float weight = exp2_approximate((scores[i][j][e] - finite(largest)) * bits);
            totals[i][half] += weight;
            deltas[i][half] += weight * of_weights[i][j][e];
          }
      }
  }

  // Sums them up over the lanes; totals become the share of a weight of 1.
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        peaks[i][half] = finite(peaks[i][half]);
        totals[i][half] = 1.0f / sum_of_row(totals[i][half]);
        deltas[i][half] = sum_of_row(deltas[i][half]) * totals[i][half];
      }
  }

  // Takes the gradients of the rows' logarithms from the deltas; `from` and `count` as of `store`.
  __device__ void subtract_from_deltas(const float* from, int count) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * i + 8 * half + threadIdx.x % 32 / 4;
        if (row < count) deltas[i][half] -= from[row];
      }
  }

  // `to` is for the warp's first row, `count` how many rows it has.
  __device__ void store(float4* to, int count) const {
    if (threadIdx.x % 4) return;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * i + 8 * half + threadIdx.x % 32 / 4;
        if (row < count) to[row] = make_float4(peaks[i][half], totals[i][half], deltas[i][half], 0.0f);
      }
  }
};

__device__ inline float4* statistics_of(const Args& args, const Owner& owner) {
  return reinterpret_cast<float4*>(args.statistics) + (owner.b * args.num_heads + owner.a) * args.num_tokens;
}

// A first pass over the keys finds the statistics, which the keys' kernel needs too. delta is the sum of grad * y as
// well, but rounded otherwise: where one key takes all the weight, ds must be nothing, not noise.
template <class T, int kWidth>
__global__ void __launch_bounds__(Sizes<kWidth>::kThreads, Sizes<kWidth>::kPerProcessor) queries_kernel(Args args) {
  using S = Sizes<kWidth>;
  constexpr int kBlocks = S::kBlocks, kColumns = S::kColumns;
  const Stage<T, kWidth> stages{shared_memory()};
  const Owner owner = owner_of(args);
  const int width = static_cast<int>(args.width), row = threadIdx.x / 32 * (16 * kBlocks);  // the warp's first
  start_owned(owner, args.q, width, owned<T, kWidth>(0));
  start_owned(owner, args.grad, width, owned<T, kWidth>(1));
  land();
  const InRegisters<T, kBlocks, kWidth> queries(owned<T, kWidth>(0), row), grads(owned<T, kWidth>(1), row);
  __syncthreads();

  const float scale = 1.0f / sqrtf(static_cast<float>(width)), bits = kBits * scale;
  Sums<kBlocks, kColumns> scores, of_weights;
  const auto multiply = [&](const Stage<T, kWidth>& stage, int first, int column) {
    multiply_by_rows<kBlocks, kColumns>(scores, queries, stage.first(), column);
    multiply_by_rows<kBlocks, kColumns>(of_weights, grads, stage.second(), column);
    mask<kBlocks, kColumns>(scores, first + column, owner.end);
  };
  const auto nothing = [](const Stage<T, kWidth>&, int) {};

  Statistics<kBlocks> of;
  visit_all(owner, args.k, args.v, width, stages, nothing, [&](const Stage<T, kWidth>& stage, int first) {
#pragma unroll 1
    for (int column = 0; column < S::kVisited; column += kColumns) {
      multiply(stage, first, column);
      of.template add<kColumns>(scores, of_weights, bits);
    }
  });
  of.finish();
  const int count = owner.end - owner.row - row;
  if (args.grad_lse) {
    const int64_t head = (owner.b * args.num_heads + owner.a) * args.num_tokens;
    of.subtract_from_deltas(reinterpret_cast<const float*>(args.grad_lse) + head + owner.row + row, count);
  }
  of.store(statistics_of(args, owner) + owner.row + row, count);

  Sums<kBlocks, kWidth> sums;
  clear<kBlocks, kWidth>(sums);
  visit_all(owner, args.k, args.v, width, stages, nothing, [&](const Stage<T, kWidth>& stage, int first) {
#pragma unroll 1
    for (int column = 0; column < S::kVisited; column += kColumns) {
      multiply(stage, first, column);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i)
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float weight = exp2_approximate((scores[i][j][e] - of.peaks[i][e / 2]) * bits);
            scores[i][j][e] = weight * (of.totals[i][e / 2] * scale) * (of_weights[i][j][e] - of.deltas[i][e / 2]);
          }
      add_weighted<kBlocks, kColumns>(sums, scores, stage.first(), column);
    }
  });
  float ones[kBlocks][2];
#pragma unroll
  for (int i = 0; i < 2 * kBlocks; ++i) ones[i / 2][i % 2] = 1.0f;
  store_rows<kBlocks>(sums, ones, owned<T, kWidth>(0), row, owner.at<T>(args.grad_q, owner.row + row),
                      args.grad_q.stride_n, count, width);
}

template <int kWidth> constexpr int kResident = Sizes<kWidth>::kIsNarrow ? 1 : 2;  // owned tiles that stay: of v, of k

// Scores are transposed here: rows are keys.
template <class T, int kWidth>
__global__ void __launch_bounds__(Sizes<kWidth>::kThreads, Sizes<kWidth>::kPerProcessor) keys_kernel(Args args) {
  using S = Sizes<kWidth>;
  constexpr int kBlocks = S::kBlocks, kColumns = S::kColumns;
  const Stage<T, kWidth> stages{shared_memory() + kResident<kWidth> * S::kOwnedBytes};
  const Owner owner = owner_of(args);
  const int width = static_cast<int>(args.width), row = threadIdx.x / 32 * (16 * kBlocks);
  start_owned(owner, args.v, width, owned<T, kWidth>(0));
  start_owned(owner, args.k, width, owned<T, kWidth>(1));
  land();
  using Keys = std::conditional_t<kResident<kWidth> == 1, InRegisters<T, kBlocks, kWidth>, InShared<T, kWidth>>;
  const InShared<T, kWidth> values{owned<T, kWidth>(0), row};
  const Keys keys{owned<T, kWidth>(1), row};
  __syncthreads();

  const float4* const statistics = statistics_of(args, owner);
  const auto start_statistics = [&](const Stage<T, kWidth>& stage, int first) {  // 0 for a query that is not there
    const int i = threadIdx.x;
    if (i < S::kVisited) copy_async<16>(stage.statistics() + i, statistics + first + i, first + i < owner.end);
  };
  const float scale = 1.0f / sqrtf(static_cast<float>(width)), bits = kBits * scale;
  Sums<kBlocks, kWidth> sums_k, sums_v;
  clear<kBlocks, kWidth>(sums_k);
  clear<kBlocks, kWidth>(sums_v);
  visit_all(
      owner, args.q, args.grad, width, stages, start_statistics, [&](const Stage<T, kWidth>& stage, int) {
#pragma unroll 1
        for (int column = 0; column < S::kVisited; column += kColumns) {
          Sums<kBlocks, kColumns> weights, of_weights;
          multiply_by_rows<kBlocks, kColumns>(weights, keys, stage.first(), column);
          multiply_by_rows<kBlocks, kColumns>(of_weights, values, stage.second(), column);
#pragma unroll
          for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const float4 of = stage.statistics()[column + 8 * j + threadIdx.x % 4 * 2 + c];
#pragma unroll
              for (int i = 0; i < kBlocks; ++i)
#pragma unroll
                for (int e = c; e < 4; e += 2) {
                  const float weight = exp2_approximate((weights[i][j][e] - of.x) * bits) * of.y;
                  weights[i][j][e] = weight;
                  of_weights[i][j][e] = weight * (of_weights[i][j][e] - of.z) * scale;
                }
            }
          add_weighted<kBlocks, kColumns>(sums_v, weights, stage.second(), column);
          add_weighted<kBlocks, kColumns>(sums_k, of_weights, stage.first(), column);
        }
      });
  float ones[kBlocks][2];
#pragma unroll
  for (int i = 0; i < 2 * kBlocks; ++i) ones[i / 2][i % 2] = 1.0f;
  const int count = owner.end - owner.row - row;
  store_rows<kBlocks>(sums_k, ones, owned<T, kWidth>(0), row, owner.at<T>(args.grad_k, owner.row + row),
                      args.grad_k.stride_n, count, width);
  store_rows<kBlocks>(sums_v, ones, owned<T, kWidth>(1), row, owner.at<T>(args.grad_v, owner.row + row),
                      args.grad_v.stride_n, count, width);
}

template <class T, int kWidth> struct Queries {
  static const char* run(const Args& args, unsigned blocks, cudaStream_t stream) {
    constexpr int kOwnedBytes = 2 * Sizes<kWidth>::kOwnedBytes;
    constexpr int kStageBytes = Sizes<kWidth>::kStages * Stage<T, kWidth>::kBytes;
    constexpr int kBytes = kOwnedBytes > kStageBytes ? kOwnedBytes : kStageBytes;
    return launch<queries_kernel<T, kWidth>>(blocks, Sizes<kWidth>::kThreads, kBytes, stream, args);
  }
};

template <class T, int kWidth> struct Keys {
  static const char* run(const Args& args, unsigned blocks, cudaStream_t stream) {
    using S = Sizes<kWidth>;
    constexpr int kBytes = kResident<kWidth> * S::kOwnedBytes + S::kStages * Stage<T, kWidth>::kBytes;
    static_assert(2 * S::kOwnedBytes <= kBytes);
    return launch<keys_kernel<T, kWidth>>(blocks, Sizes<kWidth>::kThreads, kBytes, stream, args);
  }
};

}  // namespace

const char* backward_cuda(const Args& args, int device, uintptr_t stream) {
  const char* error = launch_for<Queries>(args, device, stream);
  return error ? error : launch_for<Keys>(args, device, stream);
}

}  // namespace cogvx::joint_attention
