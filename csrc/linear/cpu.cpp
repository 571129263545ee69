// Compiled once for each instruction set (COGVX_ISA names it); no standard containers here, see expert_layernorm.
//
// b is packed in panels of kColumns columns, k after k, as many at a time as kPackedBytes hold; a in panels of kRows
// rows, by each thread for the rows that it works on. A tile of kRows x kColumns sums then lives in registers.
#include "linear/linear.h"

#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace cogvx::linear::COGVX_ISA {
namespace {

#if !defined(__GNUC__)
using Vec = float;
constexpr int kRows = 4;
#else
#if defined(__AVX512F__)
constexpr int kVecBytes = 64, kRows = 14;  // 28 sums, 2 columns of b and a value of a in 32 registers
#elif defined(__AVX__)
constexpr int kVecBytes = 32, kRows = 6;
#else
constexpr int kVecBytes = 16, kRows = 6;
#endif
typedef float Vec __attribute__((vector_size(kVecBytes)));
#endif
constexpr int kWidth = sizeof(Vec) / sizeof(float), kColumns = 2 * kWidth;
constexpr int64_t kTiles = 8, kBlockRows = kTiles * kRows;  // whose panels stay in the second cache
constexpr int64_t kFetched = 512;           // bytes of the next piece of a; the processor follows from there by itself
constexpr int64_t kPanelsOfTurn = 8;        // of b, that a thread packs in one go
constexpr int64_t kPackedBytes = 8 << 20;   // of panels of b at a time, about

// What is multiplied at once: a value in float, or, where the processor adds pairs of products of bfloat16, a pair.
template <class T> struct Unit {
  using type = float;
  static constexpr int64_t kTerms = 1;
  // Units that are summed before they are added to the rest: short chains of additions lose little.
  static constexpr int64_t kChain = 128;
  static float load(const T* from, int64_t, int64_t) { return widen(*from); }
  static void add_product(Vec& sum, float a, const Vec& b) { sum += a * b; }
};

#if defined(__AVX512BF16__)
template <> struct Unit<BFloat16> {
  using type = uint32_t;
  static constexpr int64_t kTerms = 2;
  static constexpr int64_t kChain = 256;
  static uint32_t load(const BFloat16* from, int64_t stride, int64_t left) {
    return from->bits | (left > 1 ? static_cast<uint32_t>(from[stride].bits) << 16 : 0u);
  }
  static void add_product(Vec& sum, uint32_t a, const Vec& b) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(a));
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)b);
  }
};
#endif

template <class T> int64_t num_units(int64_t k) { return (k + Unit<T>::kTerms - 1) / Unit<T>::kTerms; }

int64_t num_panels(int64_t n) { return (n + kColumns - 1) / kColumns; }

// `panels` panels of kCount rows (of b: columns of the result) from row `first` on, one after the other; each holds
// unit after unit, and 0 for what is beyond the last row.
template <class T, int kCount>
void pack(const Matrix& from, int64_t first, int64_t rows, int64_t k, int64_t panels, typename Unit<T>::type* to) {
  constexpr int64_t kTerms = Unit<T>::kTerms;
  const int64_t units = num_units<T>(k);
  const auto pack_unit = [&](int64_t panel, int64_t unit) {
    const int64_t row = first + panel * kCount, i = unit * kTerms;
    const T* data = reinterpret_cast<const T*>(from.data) + row * from.outer + i * from.inner;
    typename Unit<T>::type* unit_to = to + (panel * units + unit) * kCount;
    if (rows - row >= kCount && from.outer == 1) {
      for (int r = 0; r < kCount; ++r) unit_to[r] = Unit<T>::load(data + r, from.inner, k - i);
    } else if (rows - row >= kCount) {
      for (int r = 0; r < kCount; ++r) unit_to[r] = Unit<T>::load(data + r * from.outer, from.inner, k - i);
    } else {
      for (int r = 0; r < kCount; ++r)
        unit_to[r] = r < rows - row ? Unit<T>::load(data + r * from.outer, from.inner, k - i) : 0;
    }
  };
  if (from.outer == 1) {  // rows are neighbours, units may be pages apart
    for (int64_t unit = 0; unit < units; ++unit)
      for (int64_t panel = 0; panel < panels; ++panel) pack_unit(panel, unit);
  } else {
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t unit = 0; unit < units; ++unit) pack_unit(panel, unit);
  }
}

template <class U> Vec load(const U* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// sums[r, j] += the sum over a chain of k of a[k, r] b[k, j].
template <class T>
void add_chain(const typename Unit<T>::type* a, const typename Unit<T>::type* b, int64_t units,
               float (&sums)[kRows][kColumns]) {
  Vec chain[kRows][2] = {};
  for (int64_t i = 0; i < units; ++i, a += kRows, b += kColumns) {
    const Vec left = load(b), right = load(b + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      Unit<T>::add_product(chain[r][0], a[r], left);
      Unit<T>::add_product(chain[r][1], a[r], right);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < 2; ++half) {
      const Vec total = load(sums[r] + half * kWidth) + chain[r][half];
      std::memcpy(sums[r] + half * kWidth, &total, sizeof total);
    }
  }
}

// Asks for `bytes` bytes, which may lie beyond the end of what is there.
inline void fetch(const void* from, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
#endif
}

// The sums of `tiles` tiles below one another: a holds their panels, b the one of their columns. A piece of b is used
// by all of them while it is in the first cache, and the next one is on its way then.
template <class T>
void multiply_panels(const typename Unit<T>::type* a, const typename Unit<T>::type* b, int64_t units, int64_t tiles,
                     float (*sums)[kRows][kColumns]) {
  constexpr int64_t kPiece = Unit<T>::kChain * kColumns, kShare = kPiece / kTiles;
  std::memset(sums, 0, tiles * sizeof *sums);
  for (int64_t first = 0; first < units; first += Unit<T>::kChain, b += kPiece) {
    const int64_t count = first + Unit<T>::kChain < units ? Unit<T>::kChain : units - first;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const auto* panel = a + (tile * units + first) * kRows;
      fetch(b + kPiece + tile * kShare, kShare * sizeof *b);
      fetch(tile + 1 < tiles ? panel + units * kRows : a + (first + Unit<T>::kChain) * kRows, kFetched);
      add_chain<T>(panel, b, count, sums[tile]);
    }
  }
}

// e^x in float, to two units in the last place; x is at least -87 and at most 87.
inline float exponential(float x) {
  const float power = x * 1.44269504f + 12582912.0f;  // + 1.5 * 2^23: its last bits are the nearest whole number
  const float whole = power - 12582912.0f;
  const float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two parts
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  return sum * from_bits((as_bits(power) + 127u - 0x4b400000u) << 23);
}

// GELU in its tanh form is y times this share: 0.5 (1 + tanh(u)) = 1 / (1 + e^(-2u)),
// u = sqrt(2 / pi) (y + 0.044715 y^3).
struct Share {
  float value;
  float slope;  // its own
};

inline Share share_of(float y) {
  const float power = -1.59576912f * (y + 0.044715f * y * y * y);
  const float above = power < -87.0f ? -87.0f : power;  // NaN compares with nothing, and so it passes
  const float rest = exponential(above > 87.0f ? 87.0f : above), share = 1.0f / (1.0f + rest);
  const bool is_flat = power < -87.0f || power > 87.0f;  // where y^2 may be infinite
  const float slope = rest * share * share * (1.59576912f + 0.2140644f * y * y);
  return {above > 87.0f ? 0.0f : share, is_flat ? 0.0f : slope};
}

inline float gelu_of(float y) { return y * share_of(y).value; }

inline float gelu_slope_of(float y) {
  const Share share = share_of(y);
  return share.slope == 0.0f ? share.value : share.value + y * share.slope;
}

template <class T> void finish_tile(const Args& args, int64_t row, int64_t column, float (&sums)[kRows][kColumns]) {
  const int rows = args.m - row < kRows ? static_cast<int>(args.m - row) : kRows;
  const int columns = args.n - column < kColumns ? static_cast<int>(args.n - column) : kColumns;
  const T* bias = reinterpret_cast<const T*>(args.bias) + column;
  for (int r = 0; r < rows; ++r) {
    float* sum = sums[r];
    if (args.bias) {
#pragma omp simd
      for (int j = 0; j < columns; ++j) sum[j] += widen(bias[j]);
    }
    const int64_t place = (row + r) * args.n + column;
    if (args.grad) {
      const T* grad = reinterpret_cast<const T*>(args.grad) + place;
#pragma omp simd
      for (int j = 0; j < columns; ++j) sum[j] = widen(grad[j]) * gelu_slope_of(sum[j]);
    } else if (args.gelu) {
#pragma omp simd
      for (int j = 0; j < kColumns; ++j) sum[j] = gelu_of(sum[j]);
    }
    T* to = reinterpret_cast<T*>(args.c) + place;
#pragma omp simd
    for (int j = 0; j < columns; ++j) store(to + j, sum[j]);
  }
}

// How many panels of b are packed at a time: all of them where they are not too large.
template <class T> int64_t panels_at_once(const Args& args) {
  const int64_t panels = num_panels(args.n), most = kPackedBytes / (kColumns * num_units<T>(args.k) * 4 + 1);
  return most < kPanelsOfTurn ? (panels < kPanelsOfTurn ? panels : kPanelsOfTurn) : most < panels ? most : panels;
}

template <class T> void multiply_as(const Args& args, int num_threads) {
  using U = typename Unit<T>::type;
  const int64_t units = num_units<T>(args.k), panels = num_panels(args.n), at_once = panels_at_once<T>(args);
  // As many blocks of rows for each thread; how the rows are shared out does not show in the sums.
  const int64_t turns = (args.m + kBlockRows * num_threads - 1) / (kBlockRows * num_threads);
  const int64_t rows = ((args.m + turns * num_threads - 1) / (turns * num_threads) + kRows - 1) / kRows * kRows;
  const int64_t blocks = (args.m + rows - 1) / rows;
  U* packed = reinterpret_cast<U*>(args.packed);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    U* block = new U[rows * units];
    alignas(64) float sums[kTiles][kRows][kColumns];
    for (int64_t start = 0; start < panels; start += at_once) {
      const int64_t end = start + at_once < panels ? start + at_once : panels;
#pragma omp for schedule(static)
      for (int64_t p = start; p < end; p += kPanelsOfTurn) {
        const int64_t count = end - p < kPanelsOfTurn ? end - p : kPanelsOfTurn;
        pack<T, kColumns>(args.b, p * kColumns, args.n, args.k, count, packed + (p - start) * kColumns * units);
      }
      // Here the threads wait for one another, as they do before the next panels take the place of these.
#pragma omp for schedule(static)
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t first = i * rows, last = first + rows < args.m ? first + rows : args.m;
        const int64_t tiles = (last - first + kRows - 1) / kRows;
        pack<T, kRows>(args.a, first, args.m, args.k, tiles, block);
        for (int64_t p = start; p < end; ++p) {
          multiply_panels<T>(block, packed + (p - start) * kColumns * units, units, tiles, sums);
          for (int64_t tile = 0; tile < tiles; ++tile)
            finish_tile<T>(args, first + tile * kRows, p * kColumns, sums[tile]);
        }
      }
    }
    delete[] block;
  }
}

}  // namespace

void packed_bytes(const Args& args, int64_t* bytes) {
  const bool is_bfloat16 = args.dtype == DType::bfloat16;
  const int64_t units = is_bfloat16 ? num_units<BFloat16>(args.k) : args.k;
  const int64_t panels = is_bfloat16 ? panels_at_once<BFloat16>(args) : panels_at_once<float>(args);
  *bytes = panels * kColumns * units * 4;
}

void multiply(const Args& args, int num_threads) {
  switch (args.dtype) {
    case DType::float32: return multiply_as<float>(args, num_threads);
    case DType::float16: return multiply_as<Half>(args, num_threads);
    case DType::bfloat16: return multiply_as<BFloat16>(args, num_threads);
    case DType::float64: return;  // not offered
  }
}

}  // namespace cogvx::linear::COGVX_ISA
