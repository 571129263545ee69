"""`spatial_norm_silu` in Triton, for CUDA tensors, and for any tensor under TRITON_INTERPRET=1.

Every tile computes the scale and shift of its pixels from the latent again: two small products, which cost less than
reading their results would.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton_group_norm as shared
from .._group_norm import finish_gradients, gradient_of_moments
from .._halo import behind_halo, dense, gradient_of_halo, sums_dtype
from .._triton_group_norm import load_channels, load_gradient, load_statistics, silu, silu_derivative, store_with_copies
from . import projection

_ARITHMETIC = {torch.float32: tl.float32, torch.float64: tl.float64}
_LATENT_PIXELS = 16  # neighbours in a row whose gradients one program adds up
FOR_SHAPES = shared.FOR_SHAPES


@triton.jit
def _nearest(i, scale, count):
    """Where nearest resizing finds pixel i among `count`, in float32 as PyTorch does."""
    return tl.minimum((i.to(tl.float32) * scale).to(tl.int32), count - 1)


@triton.jit
def _nearest_latent(p, height, width, alone, latent_t, latent_h, latent_w, scale_t, scale_h, scale_w):
    """The latent pixels that belong to the pixels p; the first `alone` frames have the first one of the latent."""
    t, h, w = p // (height * width), p // width % height, p % width
    frame = tl.where(t < alone, 0, alone + _nearest(tl.maximum(t - alone, 0), scale_t, latent_t - alone))
    return (frame * latent_h + _nearest(h, scale_h, latent_h)) * latent_w + _nearest(w, scale_w, latent_w)


@triton.jit
def _project(z, index, inside, weight, bias, c, channels, depth, DEPTH: tl.constexpr):
    """weight z + bias at the latent pixels `index`: [pixels, C]."""
    k = tl.arange(0, DEPTH)
    rows = tl.load(z + index[:, None] * depth + k[None, :], mask=inside[:, None] & (k < depth)[None, :], other=0.0)
    within = (c < channels)[None, :] & (k < depth)[:, None]
    columns = tl.load(weight + c[None, :] * depth + k[:, None], mask=within, other=0.0)
    # Numbers of 16 bits are numbers of TF32, so the products are exact either way.
    precision: tl.constexpr = "ieee" if z.dtype.element_ty == tl.float32 else "tf32"
    product = tl.dot(rows.to(tl.float32), columns.to(tl.float32), input_precision=precision)
    return product + load_channels(bias, c, channels)[None, :]


@triton.jit
def apply_kernel(
    x, z, weight, bias, weight_y, bias_y, weight_b, bias_b, statistics, y,
    num_pixels, height, width, num_copies, channels, alone, latent_t, latent_h, latent_w, depth,
    scale_t, scale_h, scale_w, x_b, x_c, x_p, y_b, y_c, y_t, y_p,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y = silu(((x - mean) * rstd * weight + bias) * scale + shift); y points behind the halo."""
    start = tl.program_id(0) * PIXELS
    p = start + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    b = tl.program_id(2).to(tl.int64)
    inside = (p < num_pixels)[:, None] & (c < channels)[None, :]
    p64, c64 = p.to(tl.int64)[:, None], c.to(tl.int64)[None, :]
    values = tl.load(x + b * x_b + p64 * x_p + c64 * x_c, mask=inside, other=0.0).to(tl.float32)
    index = _nearest_latent(p, height, width, alone, latent_t, latent_h, latent_w, scale_t, scale_h, scale_w)
    z += b * latent_t * latent_h * latent_w * depth
    scale = _project(z, index, p < num_pixels, weight_y, bias_y, c, channels, depth, DEPTH)
    shift = _project(z, index, p < num_pixels, weight_b, bias_b, c, channels, depth, DEPTH)
    mean, rstd = load_statistics(statistics, b, c, channels)
    factor, offset = rstd * load_channels(weight, c, channels), load_channels(bias, c, channels)
    v = ((values - mean[None, :]) * factor[None, :] + offset[None, :]) * scale + shift
    copies = tl.where(start < height * width, num_copies, 0)
    in_first_frame = (p < height * width)[:, None]
    store_with_copies(y + b * y_b + p64 * y_p + c64 * y_c, silu(v), inside, in_first_frame, copies, y_t)


@triton.jit
def sums_kernel(
    grad, x, z, weight, bias, weight_y, bias_y, weight_b, bias_b, statistics,
    grad_scale, grad_shift, partials, first_t, first_h, first_w,
    height, width, num_copies, channels, latent_t, latent_h, latent_w, depth, most,
    x_b, x_c, x_p, grad_b, grad_c, grad_t, grad_p,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, ARITHMETIC: tl.constexpr = tl.float32,
):  # fmt: skip
    """The gradients of scale and shift at some latent pixels of a row, from all pixels of x that use them.

    With d = dL/dv: shift gets the sum of d, scale that of d * GroupNorm(x), both [B, T_z, H_z, W_z, C]; `partials`
    [B, programs, 2, C] has the sums of d * scale and d * scale * (x - mean). first_t, first_h and first_w say where
    the pixels of each latent frame, row and column begin; no column has more than `most`.
    """
    blocks = tl.cdiv(latent_w, PIXELS)
    row = tl.program_id(0) // blocks  # of all frames
    j = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    b = tl.program_id(2).to(tl.int64)
    inside_z, inside_c, c64 = j < latent_w, (c < channels)[None, :], c.to(tl.int64)[None, :]
    index = row * latent_w + j
    z += b * latent_t * latent_h * latent_w * depth
    scale = _project(z, index, inside_z, weight_y, bias_y, c, channels, depth, DEPTH)
    shift = _project(z, index, inside_z, weight_b, bias_b, c, channels, depth, DEPTH)
    scale, shift = scale.to(ARITHMETIC), shift.to(ARITHMETIC)
    mean, rstd = load_statistics(statistics, b, c, channels)
    factor = rstd.to(ARITHMETIC) * load_channels(weight, c, channels)
    offset = load_channels(bias, c, channels).to(ARITHMETIC)
    first = tl.load(first_w + j, mask=inside_z, other=0)
    last = tl.load(first_w + j + 1, mask=inside_z, other=0)
    sum_d = tl.zeros([PIXELS, CHANNELS], ARITHMETIC)
    sum_d_x = tl.zeros([PIXELS, CHANNELS], ARITHMETIC)
    frame, line = row // latent_h, row % latent_h
    for t in range(tl.load(first_t + frame), tl.load(first_t + frame + 1)):
        copies = tl.where(t == 0, num_copies, 0)
        for h in range(tl.load(first_h + line), tl.load(first_h + line + 1)):
            for k in range(most):
                w = first + k
                inside = (w < last)[:, None] & inside_c
                p64 = ((t * height + h) * width + w).to(tl.int64)[:, None]
                values = tl.load(x + b * x_b + p64 * x_p + c64 * x_c, mask=inside, other=0.0).to(ARITHMETIC)
                g = load_gradient(grad + b * grad_b + p64 * grad_p + c64 * grad_c, inside, inside, copies, grad_t)
                centered = values - mean[None, :]
                v = (centered * factor[None, :] + offset[None, :]) * scale + shift
                d = g * silu_derivative(v)
                sum_d += d
                sum_d_x += d * centered
    at = (b * latent_t * latent_h * latent_w + index)[:, None] * channels + c[None, :]
    inside = inside_z[:, None] & inside_c
    tl.store(grad_scale + at, sum_d_x * factor[None, :] + sum_d * offset[None, :], mask=inside)
    tl.store(grad_shift + at, sum_d, mask=inside)
    target = partials + (b * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + c
    tl.store(target, tl.sum((sum_d * scale).to(tl.float64), 0), mask=c < channels)
    tl.store(target + channels, tl.sum((sum_d_x * scale).to(tl.float64), 0), mask=c < channels)


@triton.jit
def gradient_kernel(
    grad, x, z, weight, bias, weight_y, bias_y, weight_b, bias_b, statistics, ends, grad_x,
    num_pixels, height, width, num_copies, channels, alone, latent_t, latent_h, latent_w, depth,
    scale_t, scale_h, scale_w, x_b, x_c, x_p, grad_b, grad_c, grad_t, grad_p,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dL/dx = d * scale * rstd * weight + constant + (x - mean) * slope, the last two in `ends` [B, 2, C]."""
    start = tl.program_id(0) * PIXELS
    p = start + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    b = tl.program_id(2).to(tl.int64)
    inside = (p < num_pixels)[:, None] & (c < channels)[None, :]
    p64, c64 = p.to(tl.int64)[:, None], c.to(tl.int64)[None, :]
    copies = tl.where(start < height * width, num_copies, 0)
    source = grad + b * grad_b + p64 * grad_p + c64 * grad_c
    g = load_gradient(source, inside, (p < height * width)[:, None], copies, grad_t)
    index = _nearest_latent(p, height, width, alone, latent_t, latent_h, latent_w, scale_t, scale_h, scale_w)
    z += b * latent_t * latent_h * latent_w * depth
    scale = _project(z, index, p < num_pixels, weight_y, bias_y, c, channels, depth, DEPTH)
    shift = _project(z, index, p < num_pixels, weight_b, bias_b, c, channels, depth, DEPTH)
    mean, rstd = load_statistics(statistics, b, c, channels)
    constant, slope = load_statistics(ends, b, c, channels)
    factor, offset = rstd * load_channels(weight, c, channels), load_channels(bias, c, channels)
    offsets = b * x_b + p64 * x_p + c64 * x_c
    centered = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
    d = g * silu_derivative((centered * factor[None, :] + offset[None, :]) * scale + shift)
    result = d * scale * factor[None, :] + (constant[None, :] + centered * slope[None, :])
    tl.store(grad_x + offsets, result.to(grad_x.dtype.element_ty), mask=inside)


def why_not(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_y: Tensor,
    bias_y: Tensor,
    weight_b: Tensor,
    bias_b: Tensor,
    halo: Tensor | None,
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None,  # [B, 2, C]
) -> str | None:
    if z.shape[1] > 64:
        return f"a latent of {z.shape[1]} channels is wider than 64"
    return shared.why_not(x, num_groups)


def forward(
    x: Tensor,  # [B, C, T, H, W]
    z: Tensor,  # [B, C_z, T_z, H_z, W_z]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    weight_y: Tensor,  # [C, C_z]
    bias_y: Tensor,  # [C]
    weight_b: Tensor,  # [C, C_z]
    bias_b: Tensor,  # [C]
    halo: Tensor | None,  # [B, C, num_halo, H, W]
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None,  # [B, 2, C]
) -> Tensor:  # [B, C, num_halo + T, H, W]
    y = behind_halo(x, halo, num_halo)
    if not y.numel():
        return y
    x = dense(x, x)
    tensors = _contiguous(z, weight, bias, weight_y, bias_y, weight_b, bias_b)
    options, grid = tile(x, z), _grid(x)
    with torch.cuda.device_of(x):
        apply_kernel[grid](
            x, *tensors, shared.statistics(x, num_groups, eps), y[:, :, num_halo:], x[0, 0].numel(), *x.shape[3:],
            num_halo if halo is None else 0, x.shape[1], *_latent_sizes(x, z), *shared.strides(x),
            *shared.strides_behind_halo(y), **options,
        )  # fmt: skip
    return y


def scratch(x: Tensor, z: Tensor, *others: Tensor | int | float | None) -> list[Tensor]:
    """The latent with its channels last, and the statistics."""
    return [z.movedim(1, -1).contiguous(), *shared.scratch(x)] if x.numel() else []


def backward(
    grad: Tensor,  # [B, C, num_halo + T, H, W]
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_y: Tensor,
    bias_y: Tensor,
    weight_b: Tensor,
    bias_b: Tensor,
    halo: Tensor | None,
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None,  # [B, 2, C]
) -> tuple[Tensor | None, ...]:  # of x, z, weight, bias, weight_y, bias_y, weight_b, bias_b, halo, moments
    grad, x = dense(grad, x), dense(x, x)
    tensors = _contiguous(z, weight, bias, weight_y, bias_y, weight_b, bias_b)
    b, c, num_pixels = *x.shape[:2], x[0, 0].numel() if len(x) else 0
    options, copies, own = tile(x, z), num_halo if halo is None else 0, grad[:, :, num_halo:]
    of_sums = tile_of_sums(options, sums_dtype(x))
    strides = *shared.strides(x), *shared.strides_behind_halo(grad)
    grad_x = torch.empty_like(x)
    at_latent = torch.zeros(2, b, *z.shape[2:], c, dtype=sums_dtype(x), device=x.device)  # of scale and shift
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight)
    if x.numel():
        firsts, most = _firsts(x, z)
        rows = z.shape[2] * z.shape[3] * triton.cdiv(z.shape[4], _LATENT_PIXELS)
        partials = torch.empty(b, rows, 2, c, dtype=torch.float64, device=x.device)
        with torch.cuda.device_of(x):
            stats = shared.statistics(x, num_groups, eps)
            sums_kernel[rows, triton.cdiv(c, options["CHANNELS"]), b](
                own, x, *tensors, stats, *at_latent, partials, *firsts, *x.shape[3:], copies, c, *z.shape[2:],
                z.shape[1], most, *strides, **of_sums,
            )  # fmt: skip
            grad_weight, grad_bias, ends = finish_gradients(partials.sum(1), stats, weight, num_groups, num_pixels)
            gradient_kernel[_grid(x)](
                own, x, *tensors, stats, ends, grad_x, num_pixels, *x.shape[3:], copies, c, *_latent_sizes(x, z),
                *strides, **options,
            )  # fmt: skip
    grad_z, *of_projections = projection.gradients(z, weight_y, weight_b, *at_latent.movedim(-1, 2))
    grads = grad_x, grad_z, grad_weight, grad_bias.to(bias.dtype), *of_projections
    return *grads, gradient_of_halo(grad, halo), gradient_of_moments(moments)


def tile(x: Tensor, z: Tensor) -> dict:
    """The compile-time arguments of a kernel; the depth of a product is 16 at least."""
    return shared.tile(x) | {"DEPTH": max(triton.next_power_of_2(z.shape[1]), 16)}


def tile_of_sums(options: dict, dtype: torch.dtype) -> dict:
    """The same for the kernel that adds up the gradients of the latent, in dtype."""
    # Left to itself, ptxas takes fewer registers than the kernel needs, and spills.
    return options | {"PIXELS": _LATENT_PIXELS, "ARITHMETIC": _ARITHMETIC[dtype], "maxnreg": 168}


def _grid(x: Tensor) -> tuple[int, int, int]:
    options = shared.tile(x)
    return triton.cdiv(x[0, 0].numel(), options["PIXELS"]), triton.cdiv(x.shape[1], options["CHANNELS"]), len(x)


def _contiguous(z: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """The latent with its channels side by side, and the weights."""
    return z.movedim(1, -1).contiguous(), *(weight.contiguous() for weight in weights)


def _alone(x: Tensor) -> int:
    """How many frames stand alone before those that are resized."""
    return 1 if x.shape[2] > 1 and x.shape[2] % 2 == 1 else 0


def _latent_sizes(x: Tensor, z: Tensor) -> tuple[int | float, ...]:
    """For the kernels: frames alone; frames, height, width and channels of the latent; its size by that of x."""
    alone, (t, h, w), (t_z, h_z, w_z) = _alone(x), x.shape[2:], z.shape[2:]
    return alone, t_z, h_z, w_z, z.shape[1], (t_z - alone) / (t - alone), h_z / h, w_z / w


def _firsts(x: Tensor, z: Tensor) -> tuple[list[Tensor], int]:
    """Where the frames, rows and columns of x begin that belong to each one of the latent, and the most of a column."""
    alone, firsts = _alone(x), []
    for size, count in zip(x.shape[2:], z.shape[2:], strict=True):
        before, alone = alone, 0
        resized = torch.arange(size - before, dtype=torch.float32, device=x.device)
        scale = torch.tensor((count - before) / (size - before), dtype=torch.float32).item()
        nearest = (resized * scale).int().clamp_(max=count - before - 1)
        first = torch.searchsorted(nearest, torch.arange(count - before + 1, dtype=torch.int32, device=x.device))
        firsts.append(torch.nn.functional.pad(first + before, (before, 0)).int())
    return firsts, -(-x.shape[4] // z.shape[4]) + 1
