// Tiles of rows in shared memory, how they get there, and their products by warps (the operands' layout: ptx.cuh).
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace cogvx::joint_attention {

// Rows of kWidth numbers. Pieces of 16 bytes change places within a row, so that those which a matrix load or 8 threads
// read at once, one below the other, lie in different banks.
template <class T, int kWidth> struct Tile {
  static constexpr int kPiece = 16 / static_cast<int>(sizeof(T)), kPieces = kWidth / kPiece;
  static_assert(kPieces == 4 || kPieces % 8 == 0);
  T* data;

  static __device__ int place(int row, int piece) {
    const int turn = kPieces == 4 ? row / 2 % 4 : row % 8;
    return row * kWidth + (piece ^ turn) * kPiece;
  }

  __device__ T* at(int row, int piece) const { return data + place(row, piece); }

  // The left operand of a product: 16 rows from `row` on, two pieces of each.
  __device__ void left(uint32_t (&a)[4], int row, int piece) const {
    const int lane = threadIdx.x % 32;
    load_matrices(a, at(row + lane % 16, piece + lane / 16));
  }

  // The right operands of two products: columns are 8 rows of the tile, for the second the next 8.
  __device__ void right(uint32_t (&b)[2][2], int row, int piece) const {
    const int lane = threadIdx.x % 32;
    uint32_t r[4];
    load_matrices(r, at(row + lane % 8 + lane / 16 * 8, piece + lane / 8 % 2));
    split(b, r);
  }

  // The right operands of two products: rows are 16 rows of the tile, columns those of a piece and of the next.
  __device__ void right_by_rows(uint32_t (&b)[2][2], int row, int piece) const {
    const int lane = threadIdx.x % 32;
    uint32_t r[4];
    load_matrices_transposed(r, at(row + lane % 16, piece + lane / 16));
    split(b, r);
  }

 private:
  static __device__ void split(uint32_t (&b)[2][2], const uint32_t (&r)[4]) {
    b[0][0] = r[0];
    b[0][1] = r[1];
    b[1][0] = r[2];
    b[1][1] = r[3];
  }
};

// Copies a matrix into tiles of kRows rows, one after another: a thread always the same piece of every kStep-th row.
template <class T, int kWidth, int kRows, int kThreads> class Reader {
  using Target = Tile<T, kWidth>;
  static constexpr int kStep = kThreads / Target::kPieces;
  static_assert(kThreads % Target::kPieces == 0 && kRows % kStep == 0 && kStep % 8 == 0);

 public:
  // From row `first` on; rows from `end` on and columns from `width` on are zeros.
  __device__ Reader(const char* data, int64_t stride, int first, int end, int width) : step_(kStep * stride) {
    const int row = threadIdx.x / Target::kPieces, piece = threadIdx.x % Target::kPieces;
    from_ = reinterpret_cast<const T*>(data) + (first + row) * stride + piece * Target::kPiece;
    left_ = piece * Target::kPiece < width ? end - first - row : 0;
    place_ = Target::place(row, piece);
  }

  __device__ void start(Target to) {
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      copy_async<16>(to.data + place_ + i * kStep * kWidth, from_, left_ > i * kStep);
      from_ += step_;
    }
    left_ -= kRows;
  }

 private:
  const T* from_;
  int64_t step_;
  int left_, place_;
};

// Runs `count` steps whose data is copied kStages - 1 steps ahead: start(stage) copies for the next step, and
// visit(stage) sees what has landed. prefetch() may come well before run(), with other copies before it.
template <int kStages> struct Pipeline {
  int count;

  template <class Start> __device__ void prefetch(Start start) const {
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage < count) start(stage);
      commit_copies();
    }
  }

  template <class Start, class Visit> __device__ void run(Start start, Visit visit) const {
    int stage = 0, next = kStages - 1;
    for (int step = 0; step < count; ++step) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // what has landed is seen by all, and nobody still reads the stage before
      if (step + kStages - 1 < count) start(next);
      commit_copies();
      visit(stage, step);
      stage = stage + 1 == kStages ? 0 : stage + 1;
      next = next + 1 == kStages ? 0 : next + 1;
    }
    __syncthreads();  // all stages are free
  }
};

__device__ inline __half2 rounded_pair(float x, float y, __half) { return __floats2half2_rn(x, y); }
__device__ inline __nv_bfloat162 rounded_pair(float x, float y, __nv_bfloat16) { return __floats2bfloat162_rn(x, y); }

template <class T> __device__ uint32_t packed(float x, float y) {
  const auto pair = rounded_pair(x, y, T{});
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// What a warp holds of 16 kBlocks rows and kColumns columns.
template <int kBlocks, int kColumns> using Sums = float[kBlocks][kColumns / 8][4];

template <int kBlocks, int kColumns> __device__ void clear(Sums<kBlocks, kColumns>& sums) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i)
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;
}

template <class T, int kBlocks, int kWidth> struct InRegisters {  // the warp's rows, as left operands
  static constexpr int kSteps = Tile<T, kWidth>::kPieces / 2;
  uint32_t lefts[kBlocks][kSteps][4];

  __device__ InRegisters(Tile<T, kWidth> tile, int row) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int k = 0; k < kSteps; ++k) tile.left(lefts[i][k], row + 16 * i, 2 * k);
  }
  __device__ void get(uint32_t (&a)[4], int i, int k) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = lefts[i][k][r];
  }
};

template <class T, int kWidth> struct InShared {  // the same, where registers are too few
  Tile<T, kWidth> tile;
  int row;
  __device__ void get(uint32_t (&a)[4], int i, int k) const { tile.left(a, row + 16 * i, 2 * k); }
};

using cogvx::multiply_add;
__device__ inline void multiply_add(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int8_t) {
  cogvx::multiply_add(d, a, b);
}

// The inner products of the warp's rows with kColumns rows of a tile, from `row` on, all added to `initial`.
template <int kBlocks, int kColumns, class Sum, class Own, class T, int kWidth>
__device__ void multiply_by_rows(Sum (&products)[kBlocks][kColumns / 8][4], const Own& own, Tile<T, kWidth> tile,
                                 int row, Sum initial = 0) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i)
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) products[i][j][e] = initial;
#pragma unroll
  for (int k = 0; k < Tile<T, kWidth>::kPieces / 2; ++k) {
    uint32_t a[kBlocks][4];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) own.get(a[i], i, k);
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      uint32_t b[2][2];
      tile.right(b, row + 16 * j, 2 * k);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        multiply_add(products[i][2 * j], a[i], b[0], T{});
        multiply_add(products[i][2 * j + 1], a[i], b[1], T{});
      }
    }
  }
}

// Adds up kColumns rows of a tile, from `row` on, each by its weight for the warp's rows; weights are rounded to T.
template <int kBlocks, int kColumns, class T, int kWidth>
__device__ void add_weighted(Sums<kBlocks, kWidth>& sums, const Sums<kBlocks, kColumns>& weights, Tile<T, kWidth> tile,
                             int row) {
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    uint32_t a[kBlocks][4];  // the layouts of sums and of left operands agree
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float(&of)[4] = weights[i][2 * k + r / 2];
        a[i][r] = packed<T>(of[r % 2 * 2], of[r % 2 * 2 + 1]);
      }
#pragma unroll
    for (int j = 0; j < kWidth / 16; ++j) {
      uint32_t b[2][2];
      tile.right_by_rows(b, row + 16 * k, 2 * j);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        multiply_add(sums[i][2 * j], a[i], b[0], T{});
        multiply_add(sums[i][2 * j + 1], a[i], b[1], T{});
      }
    }
  }
}

// Stores the warp's rows, each times its factor, through its own rows of a tile, from `row` on: memory is written in
// 16 bytes. `to` is the first of these rows, `count` how many there are of them, `width` that of the matrix.
template <int kBlocks, class T, int kWidth>
__device__ void store_rows(const Sums<kBlocks, kWidth>& sums, const float (&factors)[kBlocks][2], Tile<T, kWidth> tile,
                           int row, T* to, int64_t stride, int count, int width) {
  using Target = Tile<T, kWidth>;
  using Pair = decltype(rounded_pair(0.0f, 0.0f, T{}));
  using Piece = Vec<T, Target::kPiece>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i)
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = factors[i][half], x = sums[i][j][2 * half] * factor, y = sums[i][j][2 * half + 1] * factor;
        T* target = tile.at(row + 16 * i + 8 * half + lane / 4, j) + lane % 4 * 2;
        *reinterpret_cast<Pair*>(target) = rounded_pair(x, y, T{});
      }
  __syncwarp();
  const int piece = lane % Target::kPieces;
  if (piece * Target::kPiece >= width) return;
  constexpr int kStep = 32 / Target::kPieces;
#pragma unroll
  for (int i = 0; i < 16 * kBlocks / kStep; ++i)
    if (const int r = lane / Target::kPieces + i * kStep; r < count)
      *reinterpret_cast<Piece*>(to + r * stride + piece * Target::kPiece) =
          *reinterpret_cast<const Piece*>(tile.at(row + r, piece));
}

}  // namespace cogvx::joint_attention
