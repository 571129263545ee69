"""`group_norm_silu` in Triton, for CUDA tensors, and for any tensor under TRITON_INTERPRET=1."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton_group_norm as shared
from .._group_norm import finish_gradients, gradient_of_moments
from .._halo import behind_halo, dense, gradient_of_halo
from .._triton_group_norm import load_channels, load_gradient, load_statistics, silu, silu_derivative, store_with_copies

FOR_SHAPES = shared.FOR_SHAPES


@triton.jit
def apply_kernel(
    x, weight, bias, statistics, y, num_pixels, frame_pixels, num_copies, channels, x_b, x_c, x_p, y_b, y_c, y_t, y_p,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y = silu((x - mean) * rstd * weight + bias); y points behind the halo."""
    start = tl.program_id(0) * PIXELS
    p = start + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    b = tl.program_id(2).to(tl.int64)
    inside = (p < num_pixels)[:, None] & (c < channels)[None, :]
    p64, c64 = p.to(tl.int64)[:, None], c.to(tl.int64)[None, :]
    mean, rstd = load_statistics(statistics, b, c, channels)
    factor, offset = rstd * load_channels(weight, c, channels), load_channels(bias, c, channels)
    values = tl.load(x + b * x_b + p64 * x_p + c64 * x_c, mask=inside, other=0.0).to(tl.float32)
    v = (values - mean[None, :]) * factor[None, :] + offset[None, :]
    copies = tl.where(start < frame_pixels, num_copies, 0)
    store_with_copies(y + b * y_b + p64 * y_p + c64 * y_c, silu(v), inside, (p < frame_pixels)[:, None], copies, y_t)


@triton.jit
def sums_kernel(
    grad, x, weight, bias, statistics, partials, chunk, num_pixels, frame_pixels, num_copies, channels,
    x_b, x_c, x_p, grad_b, grad_c, grad_t, grad_p, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of d = dL/dv and of d * (x - mean) of every channel over one chunk: partials [B, chunks, 2, C]."""
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, num_pixels)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    b = tl.program_id(2).to(tl.int64)
    c64 = c.to(tl.int64)[None, :]
    mean, rstd = load_statistics(statistics, b, c, channels)
    factor, offset = rstd * load_channels(weight, c, channels), load_channels(bias, c, channels)
    sum_d = tl.zeros([PIXELS, CHANNELS], tl.float32)
    sum_d_x = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for start in range(first, last, PIXELS):
        p = start + tl.arange(0, PIXELS)
        p64 = p.to(tl.int64)[:, None]
        inside = (p < last)[:, None] & (c < channels)[None, :]
        copies = tl.where(start < frame_pixels, num_copies, 0)
        source = grad + b * grad_b + p64 * grad_p + c64 * grad_c
        g = load_gradient(source, inside, (p < frame_pixels)[:, None], copies, grad_t)
        values = tl.load(x + b * x_b + p64 * x_p + c64 * x_c, mask=inside, other=0.0).to(tl.float32)
        centered = values - mean[None, :]
        d = g * silu_derivative(centered * factor[None, :] + offset[None, :])
        sum_d += d
        sum_d_x += d * centered
    target = partials + (b * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + c
    tl.store(target, tl.sum(sum_d.to(tl.float64), 0), mask=c < channels)
    tl.store(target + channels, tl.sum(sum_d_x.to(tl.float64), 0), mask=c < channels)


@triton.jit
def gradient_kernel(
    grad, x, weight, bias, statistics, ends, grad_x, num_pixels, frame_pixels, num_copies, channels,
    x_b, x_c, x_p, grad_b, grad_c, grad_t, grad_p, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dL/dx = d * rstd * weight + constant + (x - mean) * slope, the last two in `ends` [B, 2, C]; strides as of x."""
    start = tl.program_id(0) * PIXELS
    p = start + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    b = tl.program_id(2).to(tl.int64)
    inside = (p < num_pixels)[:, None] & (c < channels)[None, :]
    p64, c64 = p.to(tl.int64)[:, None], c.to(tl.int64)[None, :]
    mean, rstd = load_statistics(statistics, b, c, channels)
    constant, slope = load_statistics(ends, b, c, channels)
    factor, offset = rstd * load_channels(weight, c, channels), load_channels(bias, c, channels)
    copies = tl.where(start < frame_pixels, num_copies, 0)
    source = grad + b * grad_b + p64 * grad_p + c64 * grad_c
    g = load_gradient(source, inside, (p < frame_pixels)[:, None], copies, grad_t)
    offsets = b * x_b + p64 * x_p + c64 * x_c
    centered = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
    d = g * silu_derivative(centered * factor[None, :] + offset[None, :])
    result = d * factor[None, :] + (constant[None, :] + centered * slope[None, :])
    tl.store(grad_x + offsets, result.to(grad_x.dtype.element_ty), mask=inside)


def why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    halo: Tensor | None,
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None,
) -> str | None:
    return shared.why_not(x, num_groups)


def forward(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    halo: Tensor | None,  # [B, C, num_halo, H, W]
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None,  # [B, 2, C]
) -> Tensor:  # [B, C, num_halo + T, H, W]
    y = behind_halo(x, halo, num_halo)
    if not y.numel():
        return y
    x, weight, bias = dense(x, x), weight.contiguous(), bias.contiguous()
    options, copies = shared.tile(x), num_halo if halo is None else 0
    num_pixels, frame_pixels = x[0, 0].numel(), x[0, 0, 0].numel()
    grid = triton.cdiv(num_pixels, options["PIXELS"]), triton.cdiv(x.shape[1], options["CHANNELS"]), len(x)
    with torch.cuda.device_of(x):
        apply_kernel[grid](
            x, weight, bias, shared.statistics(x, num_groups, eps), y[:, :, num_halo:], num_pixels, frame_pixels,
            copies, x.shape[1], *shared.strides(x), *shared.strides_behind_halo(y), **options,
        )  # fmt: skip
    return y


def scratch(x: Tensor, *others: Tensor | int | float | None) -> list[Tensor]:
    return shared.scratch(x) if x.numel() else []


def backward(
    grad: Tensor,  # [B, C, num_halo + T, H, W]
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    halo: Tensor | None,
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None,  # [B, 2, C]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # of x, weight, bias, halo, moments
    grad, x, weight, bias = dense(grad, x), dense(x, x), weight.contiguous(), bias.contiguous()
    grad_x = torch.empty_like(x)
    if not x.numel():
        nothing = torch.zeros_like(weight), torch.zeros_like(bias)
        return grad_x, *nothing, gradient_of_halo(grad, halo), gradient_of_moments(moments)
    b, c, num_pixels, frame_pixels = *x.shape[:2], x[0, 0].numel(), x[0, 0, 0].numel()
    options, chunk = shared.tile(x), shared.chunk_size(num_pixels)
    num_chunks, blocks = triton.cdiv(num_pixels, chunk), triton.cdiv(c, options["CHANNELS"])
    sizes = (
        num_pixels,
        frame_pixels,
        num_halo if halo is None else 0,
        c,
        *shared.strides(x),
        *shared.strides_behind_halo(grad),
    )
    own = grad[:, :, num_halo:]
    partials = torch.empty(b, num_chunks, 2, c, dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):
        stats = shared.statistics(x, num_groups, eps)
        sums_kernel[num_chunks, blocks, b](own, x, weight, bias, stats, partials, chunk, *sizes, **options)
        grad_weight, grad_bias, ends = finish_gradients(partials.sum(1), stats, weight, num_groups, num_pixels)
        grid = triton.cdiv(num_pixels, options["PIXELS"]), blocks, b
        gradient_kernel[grid](own, x, weight, bias, stats, ends, grad_x, *sizes, **options)
    return grad_x, grad_weight, grad_bias.to(bias.dtype), gradient_of_halo(grad, halo), gradient_of_moments(moments)
