// The backward pass: a thread takes a head of a sample, computes the scores again for the sum of each row, then goes
// over tiles of keys and, for each, over blocks of queries. Every sum has one order.
//
// With p = softmax(score), delta[n] = sum over e of grad[n, e] y[n, e]:
// grad_v = p^T grad, d = p * (grad v^T - delta), grad_q = d k / sqrt(E), grad_k = d^T q / sqrt(E). What the logarithm of
// a row's sum passes on is p times its gradient, which is taken from delta.
#pragma once

#include "joint_attention/cpu_forward.h"

namespace cogvx::joint_attention::COGVX_ISA {
namespace {

constexpr int kQueryBlock = 48;  // queries whose weights are kept, to be multiplied from the left by keys

// What one thread needs for a head of a sample of up to `tokens` tokens.
template <class T> struct HeadScratch {
  using A = Sum<T>;
  static constexpr int kKeys = Kind<T>::kKeyTile, kPair = Kind<T>::kPair;
  Word<T>*k, *v, *k_rows;            // tiles of keys: k and v transposed, and k as rows of panels
  Word<T>*q, *grad;                  // [tokens][steps]
  Word<T>*q_rows, *grad_rows;        // blocks of queries, as rows of panels
  A *grad_q, *top, *log_sum;         // [tokens][columns], [tokens], [tokens]
  A *delta, *delta_rest;             // [tokens], to be subtracted one after the other
  A *scores, *products;              // [kBlockRows][kKeys]: q k^T and grad v^T
  A *sums, *weighted;                // [kBlockRows][lanes]
  Word<T>*d;                         // [kBlockRows][kKeys / kPair]
  Word<T>*weights_of_keys, *d_of_keys;  // [kQueryBlock / kPair][kKeys]: pairs are of queries
  A *grad_k, *grad_v;                // [kKeys][columns]

  HeadScratch(Carver& carver, int64_t tokens, int64_t width) {
    const int64_t keys = keys_of<T>(tokens), rows = round_up(tokens, kQueryBlock);
    const int64_t steps = steps_of<T>(width), columns = columns_of<T>(width);
    const int64_t row_words = columns / kPair;
    k = carver.take<Word<T>>(keys * steps);
    v = carver.take<Word<T>>(keys * steps);
    k_rows = carver.take<Word<T>>(keys * row_words);
    q = carver.take<Word<T>>(rows * steps);
    grad = carver.take<Word<T>>(rows * steps);
    q_rows = carver.take<Word<T>>(rows * row_words);
    grad_rows = carver.take<Word<T>>(rows * row_words);
    grad_q = carver.take<A>(rows * columns);
    top = carver.take<A>(rows);
    log_sum = carver.take<A>(rows);
    delta = carver.take<A>(rows);
    delta_rest = carver.take<A>(rows);
    scores = carver.take<A>(kBlockRows * kKeys);
    products = carver.take<A>(kBlockRows * kKeys);
    sums = carver.take<A>(kBlockRows * kLanes<T>);
    weighted = carver.take<A>(kBlockRows * kLanes<T>);
    d = carver.take<Word<T>>(kBlockRows * kKeys / kPair);
    weights_of_keys = carver.take<Word<T>>(kQueryBlock / kPair * kKeys);
    d_of_keys = carver.take<Word<T>>(kQueryBlock / kPair * kKeys);
    grad_k = carver.take<A>(kKeys * columns);
    grad_v = carver.take<A>(kKeys * columns);
  }
};

// The weights of one column in consecutive rows as words.
template <class T> inline void put_columns(Word<T>* target, Vec<Sum<T>> row, Vec<Sum<T>>) { put<Sum<T>>(target, row); }
#ifdef __AVX512BF16__
template <> inline void put_columns<BFloat16>(uint32_t* target, __m512 row, __m512 next) {
  const __m512i in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(target, _mm512_permutexvar_epi16(in_turn, (__m512i)_mm512_cvtne2ps_pbh(next, row)));
}
#endif

// kBlockRows rows of q k^T and of grad v^T, against a tile of keys.
template <class T>
void score(const HeadScratch<T>& at, int64_t steps, int64_t query, int64_t first_key, int64_t num_keys) {
  constexpr int kKeys = Kind<T>::kKeyTile;
  const int64_t keys = keys_of<T>(num_keys);
  const Left<T> q{at.q + query * steps, steps, 1}, grad{at.grad + query * steps, steps, 1};
  multiply_by_keys<T>(q, at.k + first_key * steps, steps, num_keys, at.scores, kKeys);
  multiply_by_keys<T>(grad, at.v + first_key * steps, steps, num_keys, at.products, kKeys);
  if (num_keys < keys) mask_scores(at.scores, kKeys, num_keys, keys);
}

// What the weights of a block of rows need: the sums of 2^score and of 2^score * product, over a common 2^top.
template <class T> void sum_rows(const HeadScratch<T>& at, int64_t query, int64_t keys, Sum<T> factor) {
  using A = Sum<T>;
  constexpr int kCount = kLanes<T>, kKeys = Kind<T>::kKeyTile;
  for (int r = 0; r < kBlockRows; ++r) {
    const A *scores = at.scores + r * kKeys, *products = at.products + r * kKeys;
    A &top = at.top[query + r], *sums = at.sums + r * kCount, *weighted = at.weighted + r * kCount;
    const A before = raise_top<A>(scores, keys, factor, top);
    const Vec<A> ratio = exp2_of<false>(spread<A>((before - top) * factor));
    Vec<A> sum = load(sums) * ratio, of_products = load(weighted) * ratio;
    for (int64_t j = 0; j < keys; j += kCount) {
      const Vec<A> weights = exp2_of<Kind<T>::kCoarse>((load(scores + j) - top) * factor);
      sum += weights;
      of_products += weights * load(products + j);
    }
    put<A>(sums, sum);
    put<A>(weighted, of_products);
  }
}

// The logarithm (base 2) of each row's sum of weights over 2^top, and delta. This is taken from the products that it
// is to be subtracted from, and kept in two numbers: where a query sees little but one key, next to nothing is left of
// the difference, and its error should be smaller still.
template <class T>
void prepare(const Args& args, int64_t num_tokens, const Sum<T>* grad_lse, const HeadScratch<T>& at) {
  using A = Sum<T>;
  constexpr int kKeys = Kind<T>::kKeyTile;
  const int64_t steps = steps_of<T>(args.width);
  const A factor = score_factor<A>(args.width);
  for (int64_t query = 0; query < num_tokens; query += kBlockRows) {
    for (int i = 0; i < kBlockRows * kLanes<T>; ++i) at.sums[i] = at.weighted[i] = 0;
    for (int i = 0; i < kBlockRows; ++i) at.top[query + i] = lowest_top<A>;
    for (int64_t first = 0; first < num_tokens; first += kKeys) {
      const int64_t left = num_tokens - first, keys = left < kKeys ? left : kKeys;
      score<T>(at, steps, query, first, keys);
      sum_rows<T>(at, query, keys_of<T>(keys), factor);
    }
    for (int r = 0; r < kBlockRows; ++r) {
      const double sum = sum_of<A>(load(at.sums + r * kLanes<T>));
      double delta = sum_of<A>(load(at.weighted + r * kLanes<T>)) / sum;
      if (grad_lse && query + r < num_tokens) delta -= grad_lse[query + r];
      at.delta[query + r] = static_cast<A>(delta);
      at.delta_rest[query + r] = static_cast<A>(delta - static_cast<double>(at.delta[query + r]));
      at.log_sum[query + r] = static_cast<A>(log2(sum));
    }
  }
  // Rows that are no queries get no weight.
  for (int64_t i = num_tokens; i < round_up(num_tokens, kQueryBlock); ++i) {
    at.delta[i] = at.delta_rest[i] = at.top[i] = 0;
    at.log_sum[i] = std::numeric_limits<A>::infinity();
  }
}

template <class T> void pack_head(const Args& args, int64_t b, int64_t a, const Sample& sample, HeadScratch<T>& at) {
  constexpr int kKeys = Kind<T>::kKeyTile, kPair = Kind<T>::kPair;
  const int64_t steps = steps_of<T>(args.width), columns = columns_of<T>(args.width);
  const T *k = row_of<T>(args.k, b, a, sample.first), *v = row_of<T>(args.v, b, a, sample.first);
  for (int64_t first = 0; first < sample.count; first += kKeys) {
    const int64_t left = sample.count - first, count = left < kKeys ? left : kKeys;
    const T *k_tile = k + first * args.k.stride_n, *v_tile = v + first * args.v.stride_n;
    pack_transposed<T>(k_tile, args.k.stride_n, count, keys_of<T>(count), args.width, at.k + first * steps);
    pack_transposed<T>(v_tile, args.v.stride_n, count, keys_of<T>(count), args.width, at.v + first * steps);
    pack_rows<T>(k_tile, args.k.stride_n, count, keys_of<T>(count), args.width, at.k_rows + first / kPair * columns);
  }
  const T *q = row_of<T>(args.q, b, a, sample.first), *grad = row_of<T>(args.grad, b, a, sample.first);
  const int64_t rows = round_up(sample.count, kQueryBlock);
  pack_left<T>(q, args.q.stride_n, sample.count, rows, args.width, at.q);
  pack_left<T>(grad, args.grad.stride_n, sample.count, rows, args.width, at.grad);
  for (int64_t first = 0; first < sample.count; first += kQueryBlock) {
    const int64_t left = sample.count - first, count = left < kQueryBlock ? left : kQueryBlock;
    const int64_t words = first / kPair * columns, filled = round_up(count, kBlockRows);
    pack_rows<T>(q + first * args.q.stride_n, args.q.stride_n, count, filled, args.width, at.q_rows + words);
    pack_rows<T>(grad + first * args.grad.stride_n, args.grad.stride_n, count, filled, args.width,
                 at.grad_rows + words);
  }
}

// The weights p of kBlockRows rows, from `query` on, and d = p * (product - delta).
template <class T>
void differentiate(const HeadScratch<T>& at, int64_t query, int64_t row, int64_t keys, Sum<T> factor) {
  using A = Sum<T>;
  constexpr int kCount = kLanes<T>, kPair = Kind<T>::kPair, kKeys = Kind<T>::kKeyTile;
  for (int r = 0; r < kBlockRows; r += kPair) {
    for (int64_t j = 0; j < keys; j += kCount * kPair) {
      Vec<A> p[2][2] = {}, d[2][2] = {};  // rows, vectors
      for (int h = 0; h < kPair; ++h) {
        const int64_t n = query + r + h;
        for (int i = 0; i < kPair; ++i) {
          const int64_t from = (r + h) * kKeys + j + i * kCount;
          p[h][i] = exp2_of<Kind<T>::kCoarse>((load(at.scores + from) - at.top[n]) * factor - at.log_sum[n]);
          d[h][i] = p[h][i] * (load(at.products + from) - at.delta[n] - at.delta_rest[n]);
        }
        put_weights<T>(at.d + ((r + h) * kKeys + j) / kPair, d[h][0], d[h][1]);
      }
      for (int i = 0; i < kPair; ++i) {
        const int64_t to = (row + r) / kPair * kKeys + j + i * kCount;
        put_columns<T>(at.weights_of_keys + to, p[0][i], p[1][i]);
        put_columns<T>(at.d_of_keys + to, d[0][i], d[1][i]);
      }
    }
  }
}

// One tile of keys against one block of queries.
template <class T>
void backward_block(const HeadScratch<T>& at, int64_t width, int64_t first_key, int64_t num_keys, int64_t first_query,
                    int64_t num_queries) {
  using A = Sum<T>;
  constexpr int kPair = Kind<T>::kPair, kKeys = Kind<T>::kKeyTile;
  const int64_t steps = steps_of<T>(width), columns = columns_of<T>(width), keys = keys_of<T>(num_keys);
  const Word<T>* k_rows = at.k_rows + first_key / kPair * columns;
  const int64_t rows = round_up(num_queries, kBlockRows);
  for (int64_t row = 0; row < rows; row += kBlockRows) {
    const int64_t query = first_query + row;
    score<T>(at, steps, query, first_key, num_keys);
    differentiate<T>(at, query, row, keys, score_factor<A>(width));
    multiply<T, true>({at.d, kKeys / kPair, 1}, k_rows, keys / kPair, columns, at.grad_q + query * columns, columns);
  }
  const int64_t row_words = first_query / kPair * columns;
  for (int64_t key = 0; key < keys; key += kBlockRows) {
    multiply<T, true>({at.weights_of_keys + key, 1, kKeys}, at.grad_rows + row_words, rows / kPair, columns,
                      at.grad_v + key * columns, columns);
    multiply<T, true>({at.d_of_keys + key, 1, kKeys}, at.q_rows + row_words, rows / kPair, columns,
                      at.grad_k + key * columns, columns);
  }
}

template <class T>
void put_rows(const Heads& target, int64_t b, int64_t a, int64_t first, int64_t count, int64_t width,
              const Sum<T>* rows, Sum<T> factor) {
  for (int64_t i = 0; i < count; ++i, rows += columns_of<T>(width)) {
    T* row = mutable_row_of<T>(target, b, a, first + i);
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) store(row + j, rows[j] * factor);
  }
}

template <class T>
void backward_head(const Args& args, int64_t b, int64_t a, const Sample& sample, HeadScratch<T>& at) {
  using A = Sum<T>;
  constexpr int kKeys = Kind<T>::kKeyTile;
  const int64_t columns = columns_of<T>(args.width);
  const A factor = static_cast<A>(1 / sqrt(static_cast<double>(args.width)));
  pack_head<T>(args, b, a, sample, at);
  const int64_t row = (b * args.num_heads + a) * args.num_tokens + sample.first;
  prepare<T>(args, sample.count, args.grad_lse ? reinterpret_cast<const A*>(args.grad_lse) + row : nullptr, at);
  for (int64_t i = 0; i < round_up(sample.count, kQueryBlock) * columns; ++i) at.grad_q[i] = 0;
  for (int64_t key = 0; key < sample.count; key += kKeys) {
    const int64_t keys_left = sample.count - key, keys = keys_left < kKeys ? keys_left : kKeys;
    for (int64_t i = 0; i < kKeys * columns; ++i) at.grad_k[i] = at.grad_v[i] = 0;
    for (int64_t query = 0; query < sample.count; query += kQueryBlock) {
      const int64_t left = sample.count - query;
      backward_block<T>(at, args.width, key, keys, query, left < kQueryBlock ? left : kQueryBlock);
    }
    put_rows<T>(args.grad_k, b, a, sample.first + key, keys, args.width, at.grad_k, factor);
    put_rows<T>(args.grad_v, b, a, sample.first + key, keys, args.width, at.grad_v, 1);
  }
  put_rows<T>(args.grad_q, b, a, sample.first, sample.count, args.width, at.grad_q, factor);
}

template <class T> void backward_as(const Args& args, int num_threads) {
  const int64_t total = args.batch * args.num_heads * args.num_samples;
  const int64_t threads = num_threads < 1 ? 1 : num_threads < total ? num_threads : total;
  int64_t longest = 0;
  for (int64_t i = 0; i < args.num_samples; ++i)
    longest = args.samples[i].count > longest ? args.samples[i].count : longest;
  Carver count{nullptr};
  HeadScratch<T>(count, longest, args.width);
  const Memory scratch(count.used * static_cast<size_t>(threads));
#pragma omp parallel num_threads(static_cast<int>(threads)) if (total > 1)
  {
    Carver carver{scratch.data + count.used * static_cast<size_t>(thread_index())};
    HeadScratch<T> at(carver, longest, args.width);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < total; ++i) {
      const int64_t head = i / args.num_samples;
      backward_head<T>(args, head / args.num_heads, head % args.num_heads, args.samples[i % args.num_samples], at);
    }
  }
}

}  // namespace
}  // namespace cogvx::joint_attention::COGVX_ISA
