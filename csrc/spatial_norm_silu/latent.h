// What the latent says about the pixels of x: the coefficients of their rows. For cpu.cpp alone.
#pragma once

#include "common/group_norm.h"
#include "spatial_norm_silu/spatial_norm_silu.h"

namespace cogvx::spatial_norm_silu {
namespace {

constexpr int64_t kTile = 2048;  // coefficients that stay in the nearest cache, of each kind
constexpr int64_t kUnroll = 8;   // latent channels whose products are added up in registers

// The pixels of x to which some neighbours in one row of the latent are nearest; where a channel's pixels lie side by
// side, those of one channel and a whole row.
struct Part {
  int64_t b, channel, frame, row, first, last;  // columns first <= j < last of the latent
};

// What one thread works on: a row of the latent, or a channel of a sample; it consists of `parts_of_unit` parts.
inline int64_t num_units(const Args& args) {
  return args.x.batch * (args.x.channels_last ? args.z.frames * args.latent_height : args.x.channels);
}
inline int64_t tile_of(const Args& args) {
  const int64_t pixels = kTile / args.x.channels < 2 ? 2 : kTile / args.x.channels;
  return pixels < args.latent_width ? pixels : args.latent_width;
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

// The weights of the two 1x1x1 convolutions in the arithmetic type.
template <class A> struct Projection {
  int64_t depth;  // latent channels, made a multiple of kUnroll by zeros
  Scratch<A> weights, columns, bias;  // of scale, of shift: [C, C_z]; [depth, C]; [C]

  explicit Projection(const Args& args)
      : depth((args.z.channels + kUnroll - 1) / kUnroll * kUnroll),
        weights(2, args.x.channels * args.z.channels),
        columns(2, args.x.channels * depth),
        bias(2, args.x.channels) {
    const int64_t channels = args.x.channels, count = args.z.channels;
    widen_to(args.dtype, args.weight_y, channels * count, weights.row(0));
    widen_to(args.dtype, args.weight_b, channels * count, weights.row(1));
    widen_to(args.dtype, args.bias_y, channels, bias.row(0));
    widen_to(args.dtype, args.bias_b, channels, bias.row(1));
    for (int which = 0; which < 2; ++which)
      for (int64_t k = 0; k < count; ++k)
        for (int64_t c = 0; c < channels; ++c) columns.row(which)[k * channels + c] = weights.row(which)[c * count + k];
  }
};

// to = bias + z * columns for `count` latent pixels, two at a time, so that the columns are loaded once for both: rows
// of `depth` and of `channels` one after another, one row more than `count` where that is odd.
template <class A>
void project(const A* z, int64_t count, int64_t depth, int64_t channels, const A* columns, const A* bias, A* to) {
  for (int64_t j = 0; j < count; j += 2, z += 2 * depth, to += 2 * channels) {
    for (int64_t k = 0; k < depth; k += kUnroll) {
      const A *column = columns + k * channels, *z0 = z + k, *z1 = z0 + depth;
      A *to0 = to, *to1 = to + channels;
      const A *from0 = k == 0 ? bias : to0, *from1 = k == 0 ? bias : to1;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        A sum0 = from0[c], sum1 = from1[c];
#pragma GCC unroll 8
        for (int64_t u = 0; u < kUnroll; ++u) {
          const A value = column[u * channels + c];
          sum0 += value * z0[u];
          sum1 += value * z1[u];
        }
        to0[c] = sum0;
        to1[c] = sum1;
      }
    }
  }
}

#if defined(__AVX512F__)
// The same with eight columns in registers for all pixels, four of these at a time.
inline void project_16(const float* z, int64_t count, int64_t depth, int64_t channels, const float* columns,
                       const float* bias, float* to) {
  for (int64_t k = 0; k < depth; k += kUnroll) {
    __m512 column[kUnroll];
#pragma GCC unroll 8
    for (int64_t u = 0; u < kUnroll; ++u) column[u] = _mm512_loadu_ps(columns + (k + u) * channels);
    for (int64_t j = 0; j < count; j += 4) {
      const int64_t last = count - 1 - j < 3 ? count - 1 - j : 3;  // the last pixel again where there are no four
      const float* from[4];
      __m512 sum[4];
#pragma GCC unroll 4
      for (int64_t n = 0; n < 4; ++n) {
        const int64_t pixel = j + (n < last ? n : last);
        from[n] = z + pixel * depth + k;
        sum[n] = _mm512_loadu_ps(k == 0 ? bias : to + pixel * channels);
      }
#pragma GCC unroll 8
      for (int64_t u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 4
        for (int64_t n = 0; n < 4; ++n) sum[n] = _mm512_fmadd_ps(column[u], _mm512_set1_ps(from[n][u]), sum[n]);
      }
#pragma GCC unroll 4
      for (int64_t n = 0; n < 4; ++n) _mm512_storeu_ps(to + (j + (n < last ? n : last)) * channels, sum[n]);
    }
  }
}

inline void project(const float* z, int64_t count, int64_t depth, int64_t channels, const float* columns,
                    const float* bias, float* to) {
  if (channels % 16) return project<float>(z, count, depth, channels, columns, bias, to);
  for (int64_t c = 0; c < channels; c += 16) project_16(z, count, depth, channels, columns + c, bias + c, to + c);
}
#endif

// The coefficients of a part's rows, one after another; a thread has one of these.
template <class T, class A> struct Tile {
  const Args& args;
  const Affine<T, A>& affine;
  const Projection<A>& projection;
  Scratch<A> scale, factor, offset, mean, latent;

  Tile(const Args& all, const Affine<T, A>& of_channels, const Projection<A>& weights)
      : args(all),
        affine(of_channels),
        projection(weights),
        scale(tile_of(all) + 1, row_width(all)),
        factor(tile_of(all) + 1, row_width(all)),
        offset(tile_of(all) + 1, row_width(all)),
        mean(1, row_width(all)),
        latent(tile_of(all) + 2, all.x.channels_last ? weights.depth : all.latent_width) {}

  void prepare(const Part& part) { args.x.channels_last ? of_pixels(part) : of_channel(part); }

  Coefficients<A> at_index(const Part& part, int64_t index) const {
    const A* means = args.x.channels_last ? affine.of(part.b, 0).mean : mean.row(0);
    return {means, factor.row(index), offset.row(index)};
  }

 private:
  void of_pixels(const Part& part) {
    const int64_t channels = args.x.channels, depth = projection.depth;
    const Coefficients<A> of = affine.of(part.b, 0);
    const int64_t count = part.last - part.first;
    for (int64_t j = 0; j < count; ++j)
      widen_row(at<T>(args.z, part.b, 0, part.frame, part.row * args.latent_width + part.first + j), latent.row(j),
                args.z.channels);
    project(latent.data, count, depth, channels, projection.columns.row(0), projection.bias.row(0), scale.data);
    project(latent.data, count, depth, channels, projection.columns.row(1), projection.bias.row(1), offset.data);
    for (int64_t j = 0; j < count; ++j) {  // (GroupNorm of x) * scale + shift
      A *scales = scale.row(j), *factors = factor.row(j), *offsets = offset.row(j);
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        factors[c] = of.factor[c] * scales[c];
        offsets[c] += of.offset[c] * scales[c];
      }
    }
  }

  void of_channel(const Part& part) {
    const Coefficients<A> of = affine.of(part.b, part.channel);
    for (int which = 0; which < 2; ++which) {
      A* sum = latent.row(which);
      const A* weight = projection.weights.row(which) + part.channel * args.z.channels;
      fill(sum, args.latent_width, projection.bias.row(which)[part.channel]);
      for (int64_t k = 0; k < args.z.channels; ++k) {
        const T* z = at<T>(args.z, part.b, k, part.frame, part.row * args.latent_width);
#pragma omp simd
        for (int64_t j = 0; j < args.latent_width; ++j) sum[j] += weight[k] * static_cast<A>(widen(z[j]));
      }
      A* wide = which == 0 ? scale.row(0) : offset.row(0);
      for (int64_t j = 0; j < args.latent_width; ++j)
        for (int64_t w = args.first_column[j]; w < args.first_column[j + 1]; ++w) wide[w] = sum[j];
    }
    A *scales = scale.row(0), *factors = factor.row(0), *offsets = offset.row(0);
    const A of_x = of.factor[0], constant = of.offset[0];
#pragma omp simd
    for (int64_t w = 0; w < args.width; ++w) {
      factors[w] = of_x * scales[w];
      offsets[w] += constant * scales[w];
    }
    fill(mean.row(0), args.width, of.mean[0]);
  }
};

}  // namespace
}  // namespace cogvx::spatial_norm_silu
