// Compiled once for each instruction set (COGVX_ISA names it).
#include "group_norm_silu/group_norm_silu.h"

#include <cstring>

#include "common/group_norm.h"

namespace cogvx::group_norm_silu::COGVX_ISA {
namespace {

constexpr int64_t kPlaneRow = 512;  // values of a row where a channel's pixels lie side by side

// Rows of one block of pixels, or of one channel of a frame.
struct Part {
  int64_t b, channel, frame, first, last, row_pixels, width;

  int64_t width_at(int64_t pixel) const { return row_pixels == 1 || pixel + width <= last ? width : last - pixel; }
};

int64_t num_parts(const Video& x) {
  return x.batch * (x.channels_last ? blocks_of_sample(x) : x.channels * x.frames);
}

Part part_at(const Video& x, int64_t index) {
  if (x.channels_last) {
    const Block block = block_at(x, index);
    return {block.b, 0, block.frame, block.first, block.last, 1, x.channels};
  }
  const int64_t plane = index / x.frames;
  return {plane / x.channels, plane % x.channels, index % x.frames, 0, x.pixels, kPlaneRow, kPlaneRow};
}

// The coefficients of a part's rows; those of a single channel are repeated in `buffer`.
template <class T, class A>
Coefficients<A> coefficients_of(const Affine<T, A>& affine, const Part& part, const Scratch<A>& buffer) {
  const Coefficients<A> of = affine.of(part.b, part.channel);
  if (part.row_pixels == 1) return of;
  fill(buffer.row(0), part.width, of.mean[0]);
  fill(buffer.row(1), part.width, of.factor[0]);
  fill(buffer.row(2), part.width, of.offset[0]);
  return {buffer.row(0), buffer.row(1), buffer.row(2)};
}

int64_t row_width(const Video& x) { return x.channels_last ? x.channels : kPlaneRow; }

template <class T>
void forward_part(const Args& args, const Part& part, const Coefficients<accumulator_t<T>>& of, bool streamed) {
  const int64_t frame = args.num_halo + part.frame;
  const bool copied = part.frame == 0 && args.num_copies > 0;
  const int64_t step = part.row_pixels == 1 ? part.last - part.first : part.row_pixels;
  for (int64_t pixel = part.first; pixel < part.last; pixel += step)
    apply_rows(at<T>(args.x, part.b, part.channel, part.frame, pixel),
               at<T>(args.y, part.b, part.channel, frame, pixel), part.row_pixels == 1 ? step : 1,
               part.width_at(pixel), of, streamed && !copied);
  const int64_t values = (part.last - part.first) * (part.row_pixels == 1 ? part.width : 1);
  for (int64_t copy = 0; copied && copy < args.num_copies; ++copy)
    memcpy(at<T>(args.y, part.b, part.channel, copy, part.first),
           at<T>(args.y, part.b, part.channel, frame, part.first), values * sizeof(T));
}

template <class T> void forward_as(const Args& args, int num_threads) {
  using A = accumulator_t<T>;
  const Affine<T, A> affine(args, kIsCentered<T>, kSiluUnit, num_threads);
  const int64_t total = num_parts(args.x);
  const bool streamed = is_streamed<T>(args.y);
#pragma omp parallel num_threads(num_threads) if (total > 1)
  {
    const Scratch<A> buffer(3, row_width(args.x));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < total; ++i) {
      const Part part = part_at(args.x, total - 1 - i);  // the end of x may still be in the cache
      forward_part<T>(args, part, coefficients_of(affine, part, buffer), streamed);
    }
    if (streamed) finish_streaming();
  }
}

// Sums over one part of d and d * (x - mean), by channel: `rows` has them for a few rows, `sums` for all.
template <class T, class A>
void sum_part(const Args& args, const Part& part, const Coefficients<A>& of, const Gradient<T, A>& gradient,
              const Scratch<A>& rows, double* sums) {
  const int64_t channels = part.row_pixels == 1 ? part.width : 1, step = kGradientRun * part.row_pixels;
  fill(sums, 2 * channels, 0.0);
  for (int64_t first = part.first; first < part.last; first += step) {
    fill(rows.row(0), 2 * part.width, A{0});
    for (int64_t pixel = first; pixel < part.last && pixel < first + step; pixel += part.row_pixels) {
      const int64_t width = part.width_at(pixel);
      sum_row(at<T>(args.x, part.b, part.channel, part.frame, pixel),
              gradient.row(part.b, part.channel, part.frame, pixel, width), width, of, rows.row(0), rows.row(1));
    }
    for (int64_t i = 0; i < part.width; ++i) {
      sums[channels == 1 ? 0 : i] += rows.row(0)[i];
      sums[channels == 1 ? 1 : channels + i] += rows.row(1)[i];
    }
  }
}

// Adds the parts up in their order: [B, 2, C].
void add_parts(const Video& x, const double* parts, double* sums) {
  const int64_t of_sample = num_parts(x) / (x.batch ? x.batch : 1), channels = x.channels_last ? x.channels : 1;
  fill(sums, x.batch * 2 * x.channels, 0.0);
  for (int64_t b = 0; b < x.batch; ++b) {
    for (int64_t i = 0; i < of_sample; ++i) {
      const double* part = parts + (b * of_sample + i) * 2 * channels;
      double* sum = sums + b * 2 * x.channels + (x.channels_last ? 0 : i / x.frames);
      for (int64_t c = 0; c < channels; ++c) {
        sum[c] += part[c];
        sum[x.channels + c] += part[channels + c];
      }
    }
  }
}

template <class T, class A> void backward_as(const Args& args, int num_threads) {
  const Video& x = args.x;
  const Affine<T, A> affine(args, true, 1, num_threads);
  const int64_t total = num_parts(x), width = row_width(x);
  const Scratch<double> parts(total, 2 * (x.channels_last ? x.channels : 1)), sums(x.batch, 2 * x.channels);
  const Scratch<A> ends(2, x.batch * x.channels);  // constant and slope of dL/dx
#pragma omp parallel num_threads(num_threads) if (total > 1)
  {
    const Scratch<A> buffer(8, width);
    const Gradient<T, A> gradient{args.grad, args.num_halo, args.num_copies, buffer.row(3)};
    const Scratch<A> rows(2, width);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < total; ++i) {
      const Part part = part_at(x, i);
      sum_part<T>(args, part, coefficients_of(affine, part, buffer), gradient, rows, parts.row(i));
    }
#pragma omp single
    {
      add_parts(x, parts.data, sums.data);
      finish_gradients(x, args.num_groups, affine.statistics.row(1), affine.of_all.row(0), sums.data,
                       reinterpret_cast<A*>(args.grad_weight), reinterpret_cast<A*>(args.grad_bias), ends.row(0),
                       ends.row(1));
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < total; ++i) {
      const Part part = part_at(x, total - 1 - i);
      const Coefficients<A> of = coefficients_of(affine, part, buffer);
      const A *constant = ends.row(0) + part.b * x.channels + part.channel, *slope = constant + ends.width;
      if (part.row_pixels > 1) {
        fill(buffer.row(4), width, constant[0]);
        fill(buffer.row(5), width, slope[0]);
        constant = buffer.row(4), slope = buffer.row(5);
      }
      for (int64_t pixel = part.first; pixel < part.last; pixel += part.row_pixels) {
        const int64_t values = part.width_at(pixel);
        gradient_row(at<T>(x, part.b, part.channel, part.frame, pixel),
                     gradient.row(part.b, part.channel, part.frame, pixel, values),
                     at<T>(args.grad_x, part.b, part.channel, part.frame, pixel), values, of, constant, slope);
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

}  // namespace cogvx::group_norm_silu::COGVX_ISA
