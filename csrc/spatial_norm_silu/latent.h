// What the latent says about the pixels of x: the coefficients of their rows. For cpu.cpp alone.
#pragma once

#include "common/group_norm.h"
#include "spatial_norm_silu/spatial_norm_silu.h"

namespace cogvx::spatial_norm_silu {
namespace {

constexpr int64_t kTile = 4096;  // coefficients that stay in the nearest cache, of each kind
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

// to = bias + z * columns for two latent pixels, so that the columns are loaded once for both.
template <class A>
void project_two(const A* z0, const A* z1, int64_t depth, int64_t channels, const A* columns, const A* bias, A* to0,
                 A* to1) {
  for (int64_t k = 0; k < depth; k += kUnroll) {
    const A *column = columns + k * channels, *p = z0 + k, *q = z1 + k;
    const A *from0 = k == 0 ? bias : to0, *from1 = k == 0 ? bias : to1;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      A sum0 = from0[c], sum1 = from1[c];
#pragma GCC unroll 8
      for (int64_t u = 0; u < kUnroll; ++u) {
        const A value = column[u * channels + c];
        sum0 += value * p[u];
        sum1 += value * q[u];
      }
      to0[c] = sum0;
      to1[c] = sum1;
    }
  }
}

// The coefficients of a part's rows, one after another; a thread has one of these.
template <class T> struct Tile {
  using A = accumulator_t<T>;
  const Args& args;
  const Affine<T>& affine;
  const Projection<A>& projection;
  Scratch<A> scale, factor, offset, mean, latent;

  Tile(const Args& all, const Affine<T>& of_channels, const Projection<A>& weights)
      : args(all),
        affine(of_channels),
        projection(weights),
        scale(tile_of(all) + 1, row_width(all)),
        factor(tile_of(all) + 1, row_width(all)),
        offset(tile_of(all) + 1, row_width(all)),
        mean(1, row_width(all)),
        latent(2, all.x.channels_last ? weights.depth : all.latent_width) {}

  void prepare(const Part& part) { args.x.channels_last ? of_pixels(part) : of_channel(part); }

  Coefficients<A> at_index(const Part& part, int64_t index) const {
    const A* means = args.x.channels_last ? affine.of(part.b, 0).mean : mean.row(0);
    return {means, factor.row(index), offset.row(index)};
  }

 private:
  void of_pixels(const Part& part) {
    const int64_t channels = args.x.channels, depth = projection.depth;
    const Coefficients<A> of = affine.of(part.b, 0);
    for (int64_t j = part.first; j < part.last; j += 2) {
      const int64_t i = j - part.first;  // the row after the last is there for an odd number of pixels
      for (int64_t n = 0; n < 2 && j + n < part.last; ++n) {
        const T* z = at<T>(args.z, part.b, 0, part.frame, part.row * args.latent_width + j + n);
        for (int64_t k = 0; k < args.z.channels; ++k) latent.row(n)[k] = widen(z[k]);
      }
      project_two(latent.row(0), latent.row(1), depth, channels, projection.columns.row(0), projection.bias.row(0),
                  scale.row(i), scale.row(i + 1));
      project_two(latent.row(0), latent.row(1), depth, channels, projection.columns.row(1), projection.bias.row(1),
                  offset.row(i), offset.row(i + 1));
      // (GroupNorm of x) * scale + shift
      for (int64_t n = i; n < i + 2; ++n) {
        A *scales = scale.row(n), *factors = factor.row(n), *offsets = offset.row(n);
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          factors[c] = of.factor[c] * scales[c];
          offsets[c] += of.offset[c] * scales[c];
        }
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
        for (int64_t j = 0; j < args.latent_width; ++j) sum[j] += weight[k] * widen(z[j]);
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
