// What the latent says about the pixels of x: the coefficients of their rows. For cpu.cpp alone.
#pragma once

#include <cstring>

#include "common/group_norm.h"
#include "spatial_norm_silu/spatial_norm_silu.h"

namespace cogvx::spatial_norm_silu {
namespace {

constexpr int64_t kTile = 8192;   // coefficients of each kind that are prepared together, about
constexpr int kTogether = 6;      // latent pixels whose sums are in registers

// The pixels of x to which some neighbours in one row of the latent are nearest; where a channel's pixels lie side by
// side, those of one channel and a whole row.
struct Part {
  int64_t b, channel, frame, row, first, last;  // columns first <= j < last of the latent
};

// What one thread works on: a row of the latent, or a channel of a sample; it consists of `parts_of_unit` parts.
inline int64_t num_units(const Args& args) {
  return args.x.batch * (args.x.channels_last ? args.z.frames * args.latent_height : args.x.channels);
}
inline int64_t tile_of(const Args& args) {  // parts of a row of the latent are about equal
  const int64_t parts = (args.latent_width * args.x.channels + kTile - 1) / kTile;
  const int64_t pixels = (args.latent_width + parts - 1) / parts;
  return pixels < kTogether && kTogether <= args.latent_width ? kTogether : pixels;
}
inline int64_t parts_of_unit(const Args& args) {
  if (!args.x.channels_last) return args.z.frames * args.latent_height;
  return (args.latent_width + tile_of(args) - 1) / tile_of(args);
}
inline Part part_at(const Args& args, int64_t unit, int64_t i) {
  const int64_t height = args.latent_height, frames = args.z.frames, width = args.latent_width;
  if (!args.x.channels_last)
    return {unit / args.x.channels, unit % args.x.channels, i / height, i % height, 0, width};
  const int64_t tile = tile_of(args), last = (i + 1) * tile;
  return {unit / height / frames, 0, unit / height % frames, unit % height, i * tile, last < width ? last : width};
}

// f(frame, pixel, count, index) for rows of x that share their coefficients: `count` of them one after another, nearest
// to the latent pixel `index` of the part.
template <class F> void each_run(const Args& args, const Part& part, F f) {
  for (int64_t t = args.first_frame[part.frame]; t < args.first_frame[part.frame + 1]; ++t) {
    for (int64_t h = args.first_row[part.row]; h < args.first_row[part.row + 1]; ++h) {
      const int64_t start = h * args.width, *first = args.first_column;
      if (!args.x.channels_last) {
        f(t, start, 1, 0);
        continue;
      }
      for (int64_t j = part.first; j < part.last; ++j)
        if (first[j] < first[j + 1]) f(t, start + first[j], first[j + 1] - first[j], j - part.first);
    }
  }
}

inline int64_t row_width(const Args& args) { return args.x.channels_last ? args.x.channels : args.width; }

// The weights of the two 1x1x1 convolutions in the arithmetic type, and in pairs of latent channels where the processor
// multiplies and adds pairs of bfloat16.
template <class A> struct Projection {
  Scratch<A> weights, columns, bias;  // of scale, of shift: [C, C_z]; [C_z, C]; [C]
  int64_t num_pairs;
  Scratch<uint32_t> pairs;  // [C_z / 2, C], a zero where there is no second

  explicit Projection(const Args& args)
      : weights(2, args.x.channels * args.z.channels),
        columns(2, args.x.channels * args.z.channels),
        bias(2, args.x.channels),
        num_pairs((args.z.channels + 1) / 2),
        pairs(2, args.dtype == DType::bfloat16 ? args.x.channels * num_pairs : 0) {
    const int64_t channels = args.x.channels, count = args.z.channels;
    const char *from[] = {args.weight_y, args.weight_b}, *from_bias[] = {args.bias_y, args.bias_b};
    for (int which = 0; which < 2; ++which) {
      widen_to(args.dtype, from[which], channels * count, weights.row(which));
      widen_to(args.dtype, from_bias[which], channels, bias.row(which));
      for (int64_t k = 0; k < count; ++k) {
        for (int64_t c = 0; c < channels; ++c) {
          columns.row(which)[k * channels + c] = weights.row(which)[c * count + k];
          if (args.dtype != DType::bfloat16) continue;
          const uint32_t bits = reinterpret_cast<const BFloat16*>(from[which])[c * count + k].bits;
          pairs.row(which)[k / 2 * channels + c] |= bits << (k % 2 * 16);
        }
      }
    }
  }
};

// What the latent makes of the coefficients of GroupNorm: rows of [C], one a latent pixel.
template <class A> struct Rows {
  A *factor, *offset, *scale;  // the last for gradients alone, else nullptr
};

// scale = weight_y z + bias_y and shift = weight_b z + bias_b of one latent pixel; factor * scale and
// offset * scale + unit * shift are the coefficients of x. For channels first <= c < last.
template <class T, class A>
void project_pixel(const T* z, int64_t depth, const Projection<A>& by, const Coefficients<A>& of, A unit,
                   int64_t first, int64_t last, const Rows<A>& to) {
  const int64_t channels = by.bias.width;
  A* scale = to.factor;
  for (int64_t c = first; c < last; ++c) {
    scale[c] = by.bias.row(0)[c];
    to.offset[c] = by.bias.row(1)[c];
  }
  for (int64_t k = 0; k < depth; ++k) {
    const A value = widen(z[k]), *scales = by.columns.row(0) + k * channels, *shifts = by.columns.row(1) + k * channels;
#pragma omp simd
    for (int64_t c = first; c < last; ++c) {
      scale[c] += scales[c] * value;
      to.offset[c] += shifts[c] * value;
    }
  }
  for (int64_t c = first; to.scale && c < last; ++c) to.scale[c] = scale[c];
#pragma omp simd
  for (int64_t c = first; c < last; ++c) {
    to.offset[c] = of.offset[c] * scale[c] + unit * to.offset[c];
    scale[c] *= of.factor[c];
  }
}

#if defined(__AVX512F__)
// One step of the sums for sixteen channels: a latent channel, or a pair of them.
inline int64_t steps(const float*, int64_t depth, const Projection<float>&) { return depth; }
inline int64_t steps(const Half*, int64_t depth, const Projection<float>&) { return depth; }
template <class T> __m512 column_at(const T*, const Projection<float>& by, int which, int64_t k, int64_t c) {
  return _mm512_loadu_ps(by.columns.row(which) + k * by.bias.width + c);
}
inline __m512 value_at(const float* z, int64_t k) { return _mm512_set1_ps(z[k]); }
inline __m512 value_at(const Half* z, int64_t k) { return _mm512_set1_ps(_cvtsh_ss(z[k].bits)); }
template <class T> __m512 add_product(const T*, __m512 sum, __m512 column, __m512 value) {
  return _mm512_fmadd_ps(column, value, sum);
}
#if defined(__AVX512BF16__)
inline int64_t steps(const BFloat16*, int64_t, const Projection<float>& by) { return by.num_pairs; }
inline __m512 column_at(const BFloat16*, const Projection<float>& by, int which, int64_t k, int64_t c) {
  return _mm512_loadu_ps(reinterpret_cast<const float*>(by.pairs.row(which) + k * by.bias.width + c));
}
inline __m512 value_at(const BFloat16* z, int64_t k) {
  int32_t pair;
  std::memcpy(&pair, z + 2 * k, sizeof pair);
  return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
}
inline __m512 add_product(const BFloat16*, __m512 sum, __m512 column, __m512 value) {
  return _mm512_dpbf16_ps(sum, (__m512bh)column, (__m512bh)value);
}
#else
inline int64_t steps(const BFloat16*, int64_t depth, const Projection<float>&) { return depth; }
inline __m512 value_at(const BFloat16* z, int64_t k) { return _mm512_set1_ps(widen(z[k])); }
#endif

// The same for kTogether latent pixels one after another in memory, and for their channels by sixteen; how many of
// these. `take(channel, factor, offset, scale)` gets the results.
using Together = Floats[kTogether];

template <class T, class F>
int64_t project_together(const T* z, int64_t depth, const Projection<float>& by, const Coefficients<float>& of,
                         float unit, F take) {
  const int64_t count = steps(z, depth, by);
  int64_t c = 0;
  for (; c + 16 <= by.bias.width; c += 16) {
    Together scale, shift, factor, offset;
    for (int64_t n = 0; n < kTogether; ++n) {
      scale[n] = _mm512_loadu_ps(by.bias.row(0) + c);
      shift[n] = _mm512_loadu_ps(by.bias.row(1) + c);
    }
    for (int64_t k = 0; k < count; ++k) {
      const __m512 scales = column_at(z, by, 0, k, c), shifts = column_at(z, by, 1, k, c);
#pragma GCC unroll 8
      for (int64_t n = 0; n < kTogether; ++n) {
        const __m512 value = value_at(z + n * depth, k);
        scale[n] = add_product(z, scale[n], scales, value);
        shift[n] = add_product(z, shift[n], shifts, value);
      }
    }
#pragma GCC unroll 8
    for (int64_t n = 0; n < kTogether; ++n) {
      factor[n] = load(of.factor + c) * scale[n];
      offset[n] = load(of.offset + c) * scale[n] + shift[n] * unit;
    }
    take(c, factor, offset, scale);
  }
  return c;
}

// Whether coefficients can be computed sixteen channels at a time; a pair of bfloat16 is read at once.
template <class T, class A> bool is_projected_together(const Args& args, int64_t pixels) {
  return sizeof(T) < sizeof(double) && sizeof(A) == sizeof(float) && pixels >= kTogether && args.z.channels % 2 == 0;
}
#endif

// The coefficients of a part's rows, one after another; a thread has one of these.
template <class T, class A> struct Tile {
  const Args& args;
  const Affine<T, A>& affine;
  const Projection<A>& projection;
  bool keeps_scale;
  Scratch<A> scale, factor, offset, mean;
  Scratch<double> latent;

  Tile(const Args& all, const Affine<T, A>& of_channels, const Projection<A>& weights, bool for_gradients)
      : args(all),
        affine(of_channels),
        projection(weights),
        keeps_scale(for_gradients || !all.x.channels_last),
        scale(tile_of(all), row_width(all)),
        factor(tile_of(all), row_width(all)),
        offset(tile_of(all), row_width(all)),
        mean(1, row_width(all)),
        latent(2, all.x.channels_last ? 0 : all.latent_width) {}

  void prepare(const Part& part) { args.x.channels_last ? of_pixels(part) : of_channel(part); }

  Coefficients<A> at_index(const Part& part, int64_t index) const {
    const A* means = args.x.channels_last ? affine.of(part.b, 0).mean : mean.row(0);
    return {means, factor.row(index), offset.row(index)};
  }

 private:
  void of_pixels(const Part& part) {
    const int64_t channels = args.x.channels, depth = args.z.channels;
    const Coefficients<A> of = affine.of(part.b, 0);
    const int64_t count = part.last - part.first;
    const T* z = at<T>(args.z, part.b, 0, part.frame, part.row * args.latent_width + part.first);
    int64_t done = 0;  // channels
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == sizeof(float)) {
      for (int64_t j = 0; is_projected_together<T, A>(args, count) && j < count; j += kTogether) {
        const int64_t first = j < count - kTogether ? j : count - kTogether;  // the last ones may come twice
        const Rows<A> to = rows_at(first);
        const auto store_rows = [&](int64_t c, const Together& factors, const Together& offsets,
                                    const Together& scales) {
          for (int64_t n = 0; n < kTogether; ++n) {
            if (to.scale) put(to.scale + n * channels + c, scales[n], false);
            put(to.factor + n * channels + c, factors[n], false);
            put(to.offset + n * channels + c, offsets[n], false);
          }
        };
        done = project_together(z + first * depth, depth, projection, of, affine.unit, store_rows);
      }
    }
#endif
    for (int64_t j = 0; done < channels && j < count; ++j)
      project_pixel(z + j * depth, depth, projection, of, affine.unit, done, channels, rows_at(j));
  }

  Rows<A> rows_at(int64_t index) const {
    return {factor.row(index), offset.row(index), keeps_scale ? scale.row(index) : nullptr};
  }

  void of_channel(const Part& part) {
    const Coefficients<A> of = affine.of(part.b, part.channel);
    for (int which = 0; which < 2; ++which) {
      double* sum = latent.row(which);
      const A* weight = projection.weights.row(which) + part.channel * args.z.channels;
      fill(sum, args.latent_width, static_cast<double>(projection.bias.row(which)[part.channel]));
      for (int64_t k = 0; k < args.z.channels; ++k) {
        const T* z = at<T>(args.z, part.b, k, part.frame, part.row * args.latent_width);
#pragma omp simd
        for (int64_t j = 0; j < args.latent_width; ++j) sum[j] += static_cast<double>(weight[k]) * widen(z[j]);
      }
      A* wide = which == 0 ? scale.row(0) : offset.row(0);
      for (int64_t j = 0; j < args.latent_width; ++j)
        for (int64_t w = args.first_column[j]; w < args.first_column[j + 1]; ++w)
          wide[w] = static_cast<A>(sum[j]);
    }
    A *scales = scale.row(0), *factors = factor.row(0), *offsets = offset.row(0);
    const A of_x = of.factor[0], constant = of.offset[0], unit = affine.unit;
#pragma omp simd
    for (int64_t w = 0; w < args.width; ++w) {
      factors[w] = of_x * scales[w];
      offsets[w] = constant * scales[w] + unit * offsets[w];
    }
    fill(mean.row(0), args.width, of.mean[0]);
  }
};

}  // namespace
}  // namespace cogvx::spatial_norm_silu
