// The forward pass: an online softmax over tiles of keys, for a tile of queries at a time.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <new>

#include "joint_attention/joint_attention.h"
#include "joint_attention/product.h"

namespace cogvx::joint_attention::COGVX_ISA {
namespace {

constexpr int kQueryTile = 96;
constexpr int kAlignment = 64;  // a cache line

// Hands out parts of one block of memory; without a block it only counts.
struct Carver {
  char* block;
  size_t used = 0;
  template <class E> E* take(int64_t count) {
    char* part = block ? block + used : nullptr;
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(E)), kAlignment));
    return reinterpret_cast<E*>(part);
  }
};

struct Memory {
  char* data;
  explicit Memory(size_t bytes) : data(static_cast<char*>(::operator new(bytes, std::align_val_t{kAlignment}))) {}
  ~Memory() { ::operator delete(data, std::align_val_t{kAlignment}); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

template <class T> const T* row_of(const Heads& heads, int64_t b, int64_t a, int64_t n) {
  return reinterpret_cast<const T*>(heads.data) + b * heads.stride_b + a * heads.stride_a + n * heads.stride_n;
}

template <class T> T* mutable_row_of(const Heads& heads, int64_t b, int64_t a, int64_t n) {
  return reinterpret_cast<T*>(heads.data) + b * heads.stride_b + a * heads.stride_a + n * heads.stride_n;
}

// A tile of the tokens of one sample.
struct Tile {
  Sample sample;
  int64_t keys_before;   // in the packed keys of the head: those of the samples before, with their padding
  int64_t first, count;  // in the sample
};

inline int64_t num_tiles(const Args& args, int64_t size) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < args.num_samples; ++i) tiles += ceil_div(args.samples[i].count, size);
  return tiles;
}

template <class T> Tile tile_at(const Args& args, int64_t index, int64_t size) {
  int64_t keys_before = 0;
  const Sample* sample = args.samples;
  for (; index >= ceil_div(sample->count, size); ++sample) {
    index -= ceil_div(sample->count, size);
    keys_before += keys_of<T>(sample->count);
  }
  const int64_t first = index * size, left = sample->count - first;
  return {*sample, keys_before, first, left < size ? left : size};
}

template <class T> int64_t packed_keys(const Args& args) {
  int64_t keys = 0;
  for (int64_t i = 0; i < args.num_samples; ++i) keys += keys_of<T>(args.samples[i].count);
  return keys;
}

// The scores are in units of log2, after a factor: p = 2^(score * factor - top).
template <class A> inline A score_factor(int64_t width) {
  return static_cast<A>(1.4426950408889634 / sqrt(static_cast<double>(width)));
}

// What one thread needs for a tile of queries.
template <class T> struct Queries {
  using A = Sum<T>;
  static constexpr int kKeys = Kind<T>::kKeyTile;
  Word<T>* q;        // [kQueryTile][steps]
  A* scores;         // [kBlockRows][kKeys]
  Word<T>* weights;  // [kBlockRows][kKeys / kPair]
  A* out;            // [kQueryTile][columns], not yet divided by the sums
  A* sums;           // [kQueryTile][lanes]
  A* top;            // [kQueryTile], at most `slack` below the largest score so far

  Queries(Carver& carver, int64_t width)
      : q(carver.take<Word<T>>(kQueryTile * steps_of<T>(width))),
        scores(carver.take<A>(kBlockRows * kKeys)),
        weights(carver.take<Word<T>>(kBlockRows * kKeys / Kind<T>::kPair)),
        out(carver.take<A>(kQueryTile * columns_of<T>(width))),
        sums(carver.take<A>(kQueryTile * kLanes<T>)),
        top(carver.take<A>(kQueryTile)) {}
};

// Consecutive weights of a row as words.
template <class T> inline void put_weights(Word<T>* target, Vec<Sum<T>> first, Vec<Sum<T>>) {
  put<Sum<T>>(target, first);
}
#ifdef __AVX512BF16__
template <> inline void put_weights<BFloat16>(uint32_t* target, __m512 first, __m512 second) {
  _mm512_storeu_si512(target, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
#endif

// The columns of the last tile that are no keys.
template <class A> inline void mask_scores(A* scores, int64_t stride, int64_t count, int64_t columns) {
  for (int r = 0; r < kBlockRows; ++r)
    for (int64_t j = count; j < columns; ++j) scores[r * stride + j] = -std::numeric_limits<A>::infinity();
}

// Below any score that matters, and finite, so that a score of -infinity gets the weight 0.
template <class A> constexpr A lowest_top = std::numeric_limits<A>::lowest() / 2;

// Raises `top` to the largest of the scores where that exceeds it by more than 2^8 in a weight; returns what it was. So
// what was added up before has seldom to be rescaled.
template <class A> inline A raise_top(const A* scores, int64_t keys, A factor, A& top) {
  const A before = top;
  Vec<A> largest = load(scores);
  for (int64_t j = Lanes<A>::count; j < keys; j += Lanes<A>::count) largest = larger<A>(largest, load(scores + j));
  if (any_above<A>(largest, top + 8 / factor)) top = top_of<A>(largest);
  return before;
}

// Turns kBlockRows rows of scores into weights and adds these up; coarse ones have errors that their rounding hides.
template <class T, bool kCoarse>
void soften(const Queries<T>& at, int64_t row, int64_t keys, int64_t columns, Sum<T> factor) {
  using A = Sum<T>;
  constexpr int kCount = kLanes<T>, kPair = Kind<T>::kPair;
  for (int r = 0; r < kBlockRows; ++r) {
    const A* scores = at.scores + r * Kind<T>::kKeyTile;
    A &top = at.top[row + r], *sums = at.sums + (row + r) * kCount;
    const A before = raise_top<A>(scores, keys, factor, top);
    if (before != top) {  // rarely, or NaN
      const Vec<A> ratio = exp2_of<false>(spread<A>((before - top) * factor));
      A* out = at.out + (row + r) * columns;
      put<A>(sums, load(sums) * ratio);
      for (int64_t j = 0; j < columns; j += kCount) put<A>(out + j, load(out + j) * ratio);
    }
    const A shift = top * factor;
    Vec<A> sum = load(sums);
    for (int64_t j = 0; j < keys; j += kCount * kPair) {
      Vec<A> weights[2] = {};
      for (int i = 0; i < kPair; ++i) {
        const Vec<A> score = load(scores + j + i * kCount);
        weights[i] = exp2_of<kCoarse>(kCoarse ? score * factor - shift : (score - top) * factor);
        sum += weights[i];
      }
      put_weights<T>(at.weights + (r * Kind<T>::kKeyTile + j) / kPair, weights[0], weights[1]);
    }
    put<A>(sums, sum);
  }
}

// Attention of a tile of queries over every key of its sample; `k` and `v` are the sample's packed keys and values.
template <class T, bool kCoarse>
void attend(const Args& args, const T* q, int64_t stride, int64_t count, int64_t num_keys, const Word<T>* k,
            const Word<T>* v, const Queries<T>& at) {
  using A = Sum<T>;
  constexpr int kKeys = Kind<T>::kKeyTile, kPair = Kind<T>::kPair;
  const int64_t steps = steps_of<T>(args.width), columns = columns_of<T>(args.width);
  const A factor = score_factor<A>(args.width);
  const int64_t rows = round_up(count, kBlockRows);
  pack_left<T>(q, stride, count, rows, args.width, at.q);
  for (int64_t i = 0; i < rows * columns; ++i) at.out[i] = 0;
  for (int64_t i = 0; i < rows * kLanes<T>; ++i) at.sums[i] = 0;
  for (int64_t i = 0; i < rows; ++i) at.top[i] = lowest_top<A>;
  for (int64_t first = 0; first < num_keys; first += kKeys) {
    const int64_t left = num_keys - first, filled = left < kKeys ? left : kKeys, keys = keys_of<T>(filled);
    for (int64_t row = 0; row < count; row += kBlockRows) {
      multiply_by_keys<T>({at.q + row * steps, steps, 1}, k + first * steps, steps, filled, at.scores, kKeys);
      if (filled < keys) mask_scores(at.scores, kKeys, filled, keys);
      soften<T, kCoarse>(at, row, keys, columns, factor);
      multiply<T, true>({at.weights, kKeys / kPair, 1}, v + first / kPair * columns, keys / kPair, columns,
                        at.out + row * columns, columns);
    }
  }
}

// The logarithms of a head's sums, from a row on.
template <class T> Sum<T>* lse_of(const Args& args, int64_t b, int64_t a, int64_t n) {
  return reinterpret_cast<Sum<T>*>(args.lse) + (b * args.num_heads + a) * args.num_tokens + n;
}

template <class T>
void forward_tile(const Args& args, int64_t b, int64_t a, const Tile& tile, const Word<T>* k, const Word<T>* v,
                  const Queries<T>& at) {
  const int64_t first = tile.sample.first + tile.first, columns = columns_of<T>(args.width);
  const auto run = args.lse ? attend<T, false> : attend<T, Kind<T>::kCoarse>;  // a logarithm is not rounded to T
  run(args, row_of<T>(args.q, b, a, first), args.q.stride_n, tile.count, tile.sample.count, k, v, at);
  const double scale = 1 / sqrt(static_cast<double>(args.width));
  for (int64_t i = 0; i < tile.count; ++i) {
    const double sum = sum_of<Sum<T>>(load(at.sums + i * kLanes<T>));
    if (args.lse) lse_of<T>(args, b, a, first)[i] = static_cast<Sum<T>>(at.top[i] * scale + log(sum));
    const Sum<T> inverse = static_cast<Sum<T>>(1 / sum);
    const Sum<T>* out = at.out + i * columns;
    T* y = mutable_row_of<T>(args.y, b, a, first + i);
#pragma omp simd
    for (int64_t j = 0; j < args.width; ++j) store(y + j, out[j] * inverse);
  }
}

template <class T>
void pack_keys(const Args& args, int64_t b, int64_t a, const Tile& tile, Word<T>* k, Word<T>* v) {
  const int64_t first = tile.sample.first + tile.first, keys = keys_of<T>(tile.count);
  pack_transposed<T>(row_of<T>(args.k, b, a, first), args.k.stride_n, tile.count, keys, args.width, k);
  pack_rows<T>(row_of<T>(args.v, b, a, first), args.v.stride_n, tile.count, keys, args.width, v);
}

// A few heads at a time: the threads pack their keys and values, then share their tiles of queries.
template <class T> void forward_as(const Args& args, int num_threads) {
  constexpr int kKeys = Kind<T>::kKeyTile, kPair = Kind<T>::kPair;
  const int64_t heads = args.batch * args.num_heads, threads = num_threads < 1 ? 1 : num_threads;
  const int64_t query_tiles = num_tiles(args, kQueryTile), key_tiles = num_tiles(args, kKeys);
  const int64_t enough = ceil_div(4 * threads, query_tiles), together = enough < heads ? enough : heads;
  const int64_t k_words = packed_keys<T>(args) * steps_of<T>(args.width);
  const int64_t v_words = packed_keys<T>(args) / kPair * columns_of<T>(args.width);
  Carver count{nullptr};
  Queries<T>(count, args.width);
  const Memory packed(sizeof(Word<T>) * static_cast<size_t>(together * (k_words + v_words)));
  const Memory scratch(count.used * static_cast<size_t>(threads));
  Word<T>*k = reinterpret_cast<Word<T>*>(packed.data), *v = k + together * k_words;
#pragma omp parallel num_threads(static_cast<int>(threads)) if (heads * query_tiles > 1)
  {
    Carver carver{scratch.data + count.used * static_cast<size_t>(thread_index())};
    const Queries<T> at(carver, args.width);
    for (int64_t head = 0; head < heads; head += together) {
      const int64_t group = heads - head < together ? heads - head : together;
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < group * key_tiles; ++i) {
        const int64_t h = i / key_tiles, index = head + h;
        const Tile tile = tile_at<T>(args, i % key_tiles, kKeys);
        const int64_t key = tile.keys_before + tile.first;
        pack_keys<T>(args, index / args.num_heads, index % args.num_heads, tile,
                     k + h * k_words + key * steps_of<T>(args.width),
                     v + h * v_words + key / kPair * columns_of<T>(args.width));
      }
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < group * query_tiles; ++i) {
        const int64_t h = i / query_tiles, index = head + h;
        const Tile tile = tile_at<T>(args, i % query_tiles, kQueryTile);
        forward_tile<T>(args, index / args.num_heads, index % args.num_heads, tile,
                        k + h * k_words + tile.keys_before * steps_of<T>(args.width),
                        v + h * v_words + tile.keys_before / kPair * columns_of<T>(args.width), at);
      }
    }
  }
}

}  // namespace
}  // namespace cogvx::joint_attention::COGVX_ISA
