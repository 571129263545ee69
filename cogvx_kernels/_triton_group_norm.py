"""What the Triton kernels of `group_norm_silu` and `spatial_norm_silu` share: statistics, SiLU, tiles of pixels.

A tile is [PIXELS, CHANNELS]; strides are those of a sample, a channel and a pixel, so that both memory formats work.
Sums are taken over chunks of a fixed size, in float32 and then, few as they are, in float64, and in a fixed order: the
results never change from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_device import why_not_there

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_PIXELS = 2**31 - 2**16
_LEAST_VALUES = 32
FOR_SHAPES = f"groups of {_LEAST_VALUES} values or more"  # in smaller ones all of a gradient can cancel, its errors not


@triton.jit
def silu(v):
    return v / (1.0 + tl.exp(-tl.maximum(v, -80.0)))


@triton.jit
def silu_derivative(v):
    e = tl.exp(-tl.maximum(v, -80.0))  # finite, so that e * s is 1 - s
    s = 1.0 / (1.0 + e)
    return s * (1.0 + v * (e * s))


@triton.jit
def load_channels(values, c, channels):
    return tl.load(values + c, mask=c < channels, other=0.0).to(tl.float32)


@triton.jit
def load_statistics(statistics, b, c, channels):
    """Mean and 1 / sqrt(variance + eps) of the channels c."""
    statistics += b * 2 * channels
    return load_channels(statistics, c, channels), load_channels(statistics + channels, c, channels)


@triton.jit
def load_gradient(grad, inside, in_first_frame, num_copies, grad_t):
    """The gradient of y, of the frame itself and, for the first one, of the copies before it."""
    g = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    for _ in range(num_copies):
        grad -= grad_t
        g += tl.load(grad, mask=inside & in_first_frame, other=0.0).to(tl.float32)
    return g


@triton.jit
def store_with_copies(y, values, inside, in_first_frame, num_copies, y_t):
    """The result; the first frame also goes before itself, `num_copies` times."""
    values = values.to(y.dtype.element_ty)
    tl.store(y, values, mask=inside)
    for _ in range(num_copies):
        y -= y_t
        tl.store(y, values, mask=inside & in_first_frame)


@triton.jit
def moments_kernel(
    x, moments, chunk, num_pixels, channels, x_b, x_c, x_p, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Mean and summed squared differences from it of every channel over one chunk: moments [B, chunks, 2, C]."""
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, num_pixels)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    b = tl.program_id(2).to(tl.int64)
    x += b * x_b + c.to(tl.int64)[None, :] * x_c
    # Differences from some value: a large mean costs no accuracy.
    shift = tl.load(x + first.to(tl.int64) * x_p, mask=(c < channels)[None, :], other=0.0).to(tl.float32)
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    squares = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for start in range(first, last, PIXELS):
        p = start + tl.arange(0, PIXELS)
        inside = (p < last)[:, None] & (c < channels)[None, :]
        values = tl.load(x + p.to(tl.int64)[:, None] * x_p, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(inside, values - shift, 0.0)
        total += d
        squares += d * d
    count = (last - first).to(tl.float64)
    sums = tl.sum(total.to(tl.float64), 0)
    mean = tl.sum(shift.to(tl.float64), 0) + sums / count
    target = moments + ((b * tl.num_programs(0) + tl.program_id(0)) * 2) * channels + c
    tl.store(target, mean, mask=c < channels)
    tl.store(
        target + channels, tl.maximum(tl.sum(squares.to(tl.float64), 0) - sums * sums / count, 0.0), mask=c < channels
    )


@triton.jit
def finish_kernel(
    moments, statistics, chunk, num_chunks, num_pixels, channels, width, num_values, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of a group, for each of its channels: statistics [B, 2, C]."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, WIDTH)
    c = tl.program_id(0) * width + i
    moments += b * num_chunks * 2 * channels
    first_mean = tl.load(moments + tl.program_id(0) * width)
    total = tl.zeros([ROWS, WIDTH], tl.float64)
    for start in range(0, num_chunks, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < num_chunks)[:, None] & (i < width)[None, :]
        count = tl.minimum(num_pixels - row * chunk, chunk).to(tl.float64)[:, None]
        mean = tl.load(moments + row.to(tl.int64)[:, None] * 2 * channels + c[None, :], mask=inside, other=0.0)
        total += tl.where(inside, (mean - first_mean) * count, 0.0)
    group_mean = first_mean + tl.sum(tl.sum(total, 1), 0) / num_values
    squares = tl.zeros([ROWS, WIDTH], tl.float64)
    for start in range(0, num_chunks, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < num_chunks)[:, None] & (i < width)[None, :]
        count = tl.minimum(num_pixels - row * chunk, chunk).to(tl.float64)[:, None]
        source = moments + row.to(tl.int64)[:, None] * 2 * channels + c[None, :]
        difference = tl.load(source, mask=inside, other=0.0) - group_mean
        within = tl.load(source + channels, mask=inside, other=0.0)
        squares += tl.where(inside, within + difference * difference * count, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / num_values + eps)
    target = statistics + b * 2 * channels + c
    tl.store(target, tl.zeros([WIDTH], tl.float32) + group_mean.to(tl.float32), mask=i < width)
    tl.store(target + channels, tl.zeros([WIDTH], tl.float32) + rstd.to(tl.float32), mask=i < width)


def tile(x: Tensor) -> dict:
    """The shape of a tile for x: 2048 values, most of them side by side in memory."""
    channels_last = x.stride(1) == 1
    channels = min(max(triton.next_power_of_2(x.shape[1]), 16), 64 if channels_last else 16)
    # A product that is fused into one sum and not into another leaves a difference where there is none.
    return {"PIXELS": 2048 // channels, "CHANNELS": channels, "num_warps": 4, "enable_fp_fusion": False}


def chunk_size(num_pixels: int) -> int:
    """Pixels whose sums one program takes: enough programs for a GPU, few enough sums to add up."""
    return 512 if num_pixels < 2**18 else 2048


def rows_of_moments(width: int) -> dict:
    """The shape in which a group's moments are added up."""
    width = triton.next_power_of_2(width)
    return {"ROWS": max(1024 // width, 1), "WIDTH": width, "num_warps": 4, "enable_fp_fusion": False}


def strides(x: Tensor) -> tuple[int, int, int]:  # x [B, C, T, H, W], dense
    """Elements from one sample, channel and pixel to the next."""
    return x.stride(0), x.stride(1), 1 if x.is_contiguous() else x.shape[1]


def strides_behind_halo(y: Tensor) -> tuple[int, int, int, int]:  # y [B, C, num_halo + T, H, W], dense
    """Elements from one sample, channel, frame and pixel to the next."""
    b, c, pixel = strides(y)
    return b, c, pixel * y.shape[3] * y.shape[4], pixel


def scratch(x: Tensor) -> list[Tensor]:  # [B, chunks, 2, C], [B, 2, C]
    """Memory for the moments of every chunk, and for the statistics."""
    b, c, num_pixels = *x.shape[:2], x.shape[2:].numel()
    num_chunks = triton.cdiv(num_pixels, chunk_size(num_pixels))
    return [x.new_empty(b, num_chunks, 2, c, dtype=torch.float64), x.new_empty(b, 2, c, dtype=torch.float32)]


def statistics(x: Tensor, num_groups: int, eps: float) -> Tensor:  # [B, 2, C]
    """Mean and 1 / sqrt(variance + eps) of every channel's group; x is dense."""
    b, c, num_pixels = *x.shape[:2], x[0, 0].numel()
    chunk, options = chunk_size(num_pixels), tile(x)
    moments, result = scratch(x)
    num_chunks = moments.shape[1]
    grid = num_chunks, triton.cdiv(c, options["CHANNELS"]), b
    moments_kernel[grid](x, moments, chunk, num_pixels, c, *strides(x), **options)
    width = c // num_groups
    finish_kernel[num_groups, b](
        moments,
        result,
        chunk,
        num_chunks,
        num_pixels,
        c,
        width,
        float(width * num_pixels),
        eps,
        **rows_of_moments(width),
    )
    return result


def why_not(x: Tensor, num_groups: int) -> str | None:
    """Why Triton cannot work on chunks like x, or None."""
    if (reason := why_not_there(x)) is not None:
        return reason
    if x.dtype not in _DTYPES:
        return f"x must be float32, float16 or bfloat16, not {x.dtype}"
    num_pixels = x.shape[2:].numel()
    values = x.shape[1] // num_groups * num_pixels
    if values < _LEAST_VALUES:
        return f"the Triton kernel takes {FOR_SHAPES}, not {values}"
    return f"T H W = {num_pixels} is above {_MAX_PIXELS}" if num_pixels > _MAX_PIXELS else None
