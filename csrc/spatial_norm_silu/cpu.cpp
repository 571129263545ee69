// Compiled once for each instruction set (COGVX_ISA names it).
#include "spatial_norm_silu/spatial_norm_silu.h"

#include <cstring>

#include "spatial_norm_silu/latent.h"

namespace cogvx::spatial_norm_silu::COGVX_ISA {
namespace {

template <class T, class A>
void forward_part(const Args& args, const Part& part, const Tile<T, A>& tile, bool streamed) {
  const int64_t width = row_width(args);
  each_run(args, part, [&](int64_t frame, int64_t pixel, int64_t count, int64_t index) {
    const T* x = at<T>(args.x, part.b, part.channel, frame, pixel);
    T* y = at<T>(args.y, part.b, part.channel, args.num_halo + frame, pixel);
    const bool copied = frame == 0 && args.num_copies > 0;
    apply_rows(x, y, count, width, tile.at_index(part, index), streamed && !copied);
    for (int64_t copy = 0; copied && copy < args.num_copies; ++copy)
      memcpy(at<T>(args.y, part.b, part.channel, copy, pixel), y, count * width * sizeof(T));
  });
}

#if defined(__AVX512F__)
// Where each pixel of the latent has one of x, its coefficients never leave the registers.
template <class T, class A> bool is_forward_fused(const Args& args) {
  const bool is_one_to_one = args.x.frames == args.z.frames && args.x.pixels == args.z.pixels &&
                             args.width == args.latent_width && args.x.channels_last;
  return is_one_to_one && args.x.channels % 16 == 0 && is_projected_together<T, A>(args, args.width);
}

template <class T>
void forward_row(const Args& args, const Part& row, const Affine<T, float>& affine,
                 const Projection<float>& projection) {
  const Coefficients<float> of = affine.of(row.b, 0);
  const int64_t depth = args.z.channels, channels = args.x.channels;
  for (int64_t j = 0; j < args.width; j += kTogether) {
    const int64_t pixel = row.row * args.width + (j < args.width - kTogether ? j : args.width - kTogether);
    const T* x = at<T>(args.x, row.b, 0, row.frame, pixel);
    T* y = at<T>(args.y, row.b, 0, args.num_halo + row.frame, pixel);
    const auto apply = [&](int64_t c, const Together& factor, const Together& offset, const Together&) {
      Together t;
#pragma GCC unroll 8
      for (int64_t n = 0; n < kTogether; ++n) {
        const int64_t i = n * channels + c;
        __builtin_prefetch(x + i + kTogether * channels);  // the processor does not see through this order
        __builtin_prefetch(y + i + kTogether * channels, 1);
        t[n] = load(x + i);
        if (kIsCentered<T>) t[n] -= load(of.mean + c);
        t[n] = t[n] * factor[n] + offset[n];
      }
      silu_together<T>(t);
#pragma GCC unroll 8
      for (int64_t n = 0; n < kTogether; ++n) put(y + n * channels + c, t[n], false);
    };
    project_together(at<T>(args.z, row.b, 0, row.frame, pixel), depth, projection, of, affine.unit, apply);
    for (int64_t copy = 0; row.frame == 0 && copy < args.num_copies; ++copy)
      memcpy(at<T>(args.y, row.b, 0, copy, pixel), y, kTogether * channels * sizeof(T));
  }
}
#endif

template <class T> void forward_as(const Args& args, int num_threads) {
  using A = accumulator_t<T>;
  const Affine<T, A> affine(args, kIsCentered<T>, kSiluUnit, num_threads);
  const Projection<A> projection(args);
  const int64_t total = num_units(args);
  const bool streamed = is_streamed<T>(args.y);
#pragma omp parallel num_threads(num_threads) if (total > 1)
  {
    Tile<T, A> tile(args, affine, projection, false);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < total; ++i) {
      const int64_t unit = total - 1 - i;  // the end of x may still be in the cache
#if defined(__AVX512F__)
      if constexpr (sizeof(A) == sizeof(float)) {
        if (is_forward_fused<T, A>(args)) {
          forward_row(args, part_at(args, unit, 0), affine, projection);
          continue;
        }
      }
#endif
      for (int64_t n = 0; n < parts_of_unit(args); ++n) {
        const Part part = part_at(args, unit, n);
        tile.prepare(part);
        forward_part(args, part, tile, streamed);
      }
    }
    if (streamed) finish_streaming();
  }
}

// The gradients of a part's scale and shift, and `sums`, to which those of the group norm's result are added.
template <class T, class A>
void sum_part(const Args& args, const Part& part, const Tile<T, A>& tile, const Gradient<T, A>& gradient,
              const Scratch<A>& rows, double* sums) {
  const int64_t width = row_width(args), count = rows.width / width;
  A *d = rows.row(0), *d_x = rows.row(1);
  fill(d, 2 * count * width, A{0});
  each_run(args, part, [&](int64_t frame, int64_t first, int64_t pixels, int64_t index) {
    for (int64_t pixel = first; pixel < first + pixels; ++pixel)
      sum_row(at<T>(args.x, part.b, part.channel, frame, pixel),
              gradient.row(part.b, part.channel, frame, pixel, width), width, tile.at_index(part, index),
              d + index * width, d_x + index * width);
  });
  const Coefficients<A> of = tile.affine.of(part.b, part.channel);
  const int64_t first_pixel = part.row * args.latent_width;
  for (int64_t j = part.first; j < part.last; ++j) {
    A* of_scale = at<A>(args.grad_scale, part.b, part.channel, part.frame, first_pixel + j);
    A* of_shift = at<A>(args.grad_shift, part.b, part.channel, part.frame, first_pixel + j);
    if (args.x.channels_last) {
      const int64_t index = (j - part.first) * width;
      const A* scale = tile.scale.row(j - part.first);
      for (int64_t c = 0; c < width; ++c) {
        sums[c] += static_cast<double>(scale[c]) * d[index + c];
        sums[width + c] += static_cast<double>(scale[c]) * d_x[index + c];
        of_scale[c] = of.factor[c] * d_x[index + c] + of.offset[c] * d[index + c];
        of_shift[c] = d[index + c];
      }
      continue;
    }
    double sum = 0, sum_x = 0;
    for (int64_t w = args.first_column[j]; w < args.first_column[j + 1]; ++w) {
      sum += d[w];
      sum_x += d_x[w];
      sums[0] += static_cast<double>(tile.scale.row(0)[w]) * d[w];
      sums[1] += static_cast<double>(tile.scale.row(0)[w]) * d_x[w];
    }
    *of_scale = static_cast<A>(of.factor[0] * sum_x + of.offset[0] * sum);
    *of_shift = static_cast<A>(sum);
  }
}

// Adds the units up in their order: [B, 2, C].
void add_units(const Args& args, const double* units, double* sums) {
  const int64_t channels = args.x.channels, of_sample = num_units(args) / (args.x.batch ? args.x.batch : 1);
  fill(sums, args.x.batch * 2 * channels, 0.0);
  for (int64_t unit = 0; unit < num_units(args); ++unit) {
    double* sum = sums + unit / of_sample * 2 * channels;
    for (int64_t c = 0; args.x.channels_last && c < 2 * channels; ++c) sum[c] += units[unit * 2 * channels + c];
    for (int64_t i = 0; !args.x.channels_last && i < 2; ++i) sum[i * channels + unit % channels] = units[2 * unit + i];
  }
}

template <class T, class A>
void gradient_part(const Args& args, const Part& part, const Tile<T, A>& tile, const Gradient<T, A>& gradient,
                   const A* constant, const A* slope) {
  const int64_t width = row_width(args);
  each_run(args, part, [&](int64_t frame, int64_t first, int64_t pixels, int64_t index) {
    for (int64_t pixel = first; pixel < first + pixels; ++pixel)
      gradient_row(at<T>(args.x, part.b, part.channel, frame, pixel),
                   gradient.row(part.b, part.channel, frame, pixel, width),
                   at<T>(args.grad_x, part.b, part.channel, frame, pixel), width, tile.at_index(part, index), constant,
                   slope);
  });
}

template <class T, class A> void backward_as(const Args& args, int num_threads) {
  const Video& x = args.x;
  const Affine<T, A> affine(args, true, 1, num_threads);
  const Projection<A> projection(args);
  const int64_t total = num_units(args), width = row_width(args), parts = parts_of_unit(args);
  const Scratch<double> units(total, 2 * (x.channels_last ? x.channels : 1)), sums(x.batch, 2 * x.channels);
  const Scratch<A> ends(2, x.batch * x.channels);  // constant and slope of dL/dx
#pragma omp parallel num_threads(num_threads) if (total > 1)
  {
    Tile<T, A> tile(args, affine, projection, true);
    const Scratch<A> buffer(3, width), rows(2, width * (x.channels_last ? tile_of(args) : 1));
    const Gradient<T, A> gradient{args.grad, args.num_halo, args.num_copies, buffer.row(0)};
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < total; ++unit) {
      for (int64_t i = 0; i < parts; ++i) {
        const Part part = part_at(args, unit, i);
        tile.prepare(part);
        sum_part(args, part, tile, gradient, rows, units.row(unit));
      }
    }
#pragma omp single
    {
      add_units(args, units.data, sums.data);
      finish_gradients(x, args.num_groups, affine.statistics.row(1), affine.of_all.row(0), sums.data,
                       reinterpret_cast<A*>(args.grad_weight), reinterpret_cast<A*>(args.grad_bias), ends.row(0),
                       ends.row(1));
    }
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < total; ++unit) {
      for (int64_t i = 0; i < parts; ++i) {
        const Part part = part_at(args, total - 1 - unit, i);
        const A *constant = ends.row(0) + part.b * x.channels + part.channel, *slope = constant + ends.width;
        if (!x.channels_last) {
          fill(buffer.row(1), width, constant[0]);
          fill(buffer.row(2), width, slope[0]);
          constant = buffer.row(1), slope = buffer.row(2);
        }
        tile.prepare(part);
        gradient_part(args, part, tile, gradient, constant, slope);
      }
    }
  }
}

}  // namespace

void forward(const Args& args, int num_threads) {
  switch (args.dtype) {
    case DType::float32: return forward_as<float>(args, num_threads);
    case DType::float16: return forward_as<Half>(args, num_threads);
    case DType::bfloat16: return forward_as<BFloat16>(args, num_threads);
    case DType::float64: return forward_as<double>(args, num_threads);
  }
}

void backward(const Args& args, int num_threads) {
  switch (args.dtype) {
    case DType::float32:
      if (args.in_double) return backward_as<float, double>(args, num_threads);
      return backward_as<float, float>(args, num_threads);
    case DType::float16: return backward_as<Half, float>(args, num_threads);
    case DType::bfloat16: return backward_as<BFloat16, float>(args, num_threads);
    case DType::float64: return backward_as<double, double>(args, num_threads);
  }
}

}  // namespace cogvx::spatial_norm_silu::COGVX_ISA
