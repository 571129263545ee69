"""`downsample_conv` in Triton, for CUDA tensors, and for any tensor under TRITON_INTERPRET=1.

Implicit matrix products over channels-last memory. Each phase (p, q) of x's pixels (2i + p, 2j + q) meets 4, 2, 2 or 1
of the 9 taps, so a program of the gradient of x makes a tile of one phase.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton_gathered as gathered
from .._triton_device import why_not_there
from .._triton_gathered import add_product, load_pixels, pixel_options, tap_and_channels

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_PIXELS = 2**31 - 2**16  # of all frames of x, which a kernel counts in 32 bits


@triton.jit
def input_kernel(
    grad, weight, grad_x, num_pixels, height, width, height_x, width_x, num_in, num_out,
    PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_x[2i + p] = sum over m of grad[i - m] weight[p + 2m]; grad [B T, H, W, C_out], weight by phases.

    `num_pixels` are those of a phase, half of the rows and columns of x rounded up. The weight is [C, taps, C_out] of
    each phase, one behind the other.
    """
    tiles_n = tl.cdiv(num_in, BLOCK_N)
    c = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    phase = tl.program_id(0) // tiles_n % 4
    taps_w = 2 - phase % 2
    num_taps = (2 - phase // 2) * taps_w
    weight += tl.where(phase == 0, 0, 2 + 2 * phase).to(tl.int64) * num_in * num_out
    place = (tl.program_id(0) // (tiles_n * 4)) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel = tl.minimum(place, num_pixels - 1)
    rows, columns = (height_x + 1) // 2, (width_x + 1) // 2
    frame, row, column = pixel // (rows * columns), pixel // columns % rows, pixel % columns
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(tl.cdiv(num_taps * num_out, BLOCK_K) if PACKED else num_taps * tl.cdiv(num_out, BLOCK_K)):
        tap, o, k, valid = tap_and_channels(i, num_taps, num_out, BLOCK_K, PACKED)
        left = load_pixels(
            grad, frame, row[:, None] - tap // taps_w, column[:, None] - tap % taps_w, o, valid, height, width, num_out
        )
        inside = (c < num_in)[None, :] & valid[:, None]
        right = tl.load(weight + c[None, :] * (num_taps * num_out) + k[:, None], mask=inside, other=0.0)
        total = add_product(left, right, total)
    r, s = 2 * row + phase // 2, 2 * column + phase % 2
    inside = ((place < num_pixels) & (r < height_x) & (s < width_x))[:, None] & (c < num_in)[None, :]
    target = grad_x + ((frame.to(tl.int64) * height_x + r) * width_x + s)[:, None] * num_in + c[None, :]
    tl.store(target, total.to(grad_x.dtype.element_ty), mask=inside)


def input_options(num_out: int, num_in: int, dtype: torch.dtype) -> dict:
    """The tile of a program of the gradient of x; with a third stage float32 spills registers on sm_80."""
    return pixel_options(num_out, num_in, 4, dtype) | ({"num_stages": 2} if dtype == torch.float32 else {})


def why_not(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if (reason := why_not_there(x)) is not None:
        return reason
    if x.dtype not in _DTYPES or any(t.dtype != x.dtype for t in (weight, bias)):
        return "every tensor must be of one dtype: float32, float16 or bfloat16"
    pixels = x.numel() // x.shape[1]
    return f"{pixels} pixels are above {_MAX_PIXELS}" if pixels > _MAX_PIXELS else None


def forward(
    x: Tensor,  # [B, C, T, H, W], H and W at least 2
    weight: Tensor,  # [C_out, C, 3, 3]
    bias: Tensor,  # [C_out]
) -> Tensor:  # [B, C_out, T, H / 2, W / 2], rounded down
    x = x.contiguous(memory_format=torch.channels_last_3d)
    b, _, t, h, w = x.shape
    shape = (b, len(weight), t, h // 2, w // 2)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    if y.numel():
        gathered.gather(x, _channels_last(weight), bias.contiguous(), y, pad=0)
    return y


def scratch(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    return [_channels_last(weight)] if x.numel() else []


def _channels_last(weight: Tensor) -> Tensor:  # [C_out, C, 3, 3] -> [C_out, 3, 3, C]
    return weight.permute(0, 2, 3, 1).contiguous()


def backward(
    grad: Tensor,  # [B, C_out, T, H / 2, W / 2]
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # of x, weight, bias
    grad_bias = grad.sum((0, 2, 3, 4), dtype=torch.float32).to(bias.dtype) if needs[2] else None
    grad, x = (t.contiguous(memory_format=torch.channels_last_3d) for t in (grad, x))
    grad_weight = None
    if needs[1]:
        grad_weight = gathered.weight_gradient(grad, x, k=3, pad=0).permute(0, 3, 1, 2).to(weight.dtype)
    return _grad_x(grad, x, weight) if needs[0] else None, grad_weight, grad_bias


def _grad_x(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    c_out = len(weight)
    grad_x = torch.empty_like(x)
    if x.numel():
        phases = [weight[:, :, p::2, q::2].permute(1, 2, 3, 0).flatten() for p in range(2) for q in range(2)]
        num_pixels, options = b * t * ((h + 1) // 2) * ((w + 1) // 2), input_options(c_out, c, x.dtype)
        grid = (triton.cdiv(num_pixels, options["BLOCK_M"]) * 4 * triton.cdiv(c, options["BLOCK_N"]),)
        with torch.cuda.device_of(x):
            input_kernel[grid](grad, torch.cat(phases), grad_x, num_pixels, *grad.shape[3:], h, w, c, c_out, **options)
    return grad_x
