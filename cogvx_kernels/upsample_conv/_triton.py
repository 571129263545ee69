"""`upsample_conv` in Triton, for CUDA tensors, and for any tensor under TRITON_INTERPRET=1.

Implicit matrix products over channels-last memory, phase by phase with the merged `taps`: y[2i + p, 2j + q] is a 2x2
convolution of x. A program makes a tile of x's pixels in one phase, by some output channels, and writes it once or,
where frames come twice, twice. Where channels are too few for a block, one block holds several taps (PACKED).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton_gathered as gathered
from .._triton_device import why_not_there
from .._triton_gathered import add_product, load_pixels, pixel_options, tap_and_channels
from .taps import FOR_SHAPES, merge_taps, split_taps, sum_pairs, why_not_merged

__all__ = ["FOR_SHAPES"]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_PIXELS = 2**31 - 2**16  # of all frames of the result, which a kernel counts in 32 bits


@triton.jit
def forward_kernel(
    x, weight, bias, y, num_pixels, num_frames, height, width, num_in, num_out,
    DOUBLE: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [B T, H, W, C], weight [2 2 phases, C_out, 2 2 taps, C], y [B T', 2H, 2W, C_out]."""
    tiles_n = tl.cdiv(num_out, BLOCK_N)
    # Neighbours share pixels: first come the tiles of channels, then the phases.
    o = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    phase = tl.program_id(0) // tiles_n % 4
    place = (tl.program_id(0) // (tiles_n * 4)) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel = tl.minimum(place, num_pixels - 1)
    frame, row, column = pixel // (height * width), pixel // width % height, pixel % width
    weight += phase.to(tl.int64) * num_out * 4 * num_in
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(tl.cdiv(4 * num_in, BLOCK_K) if PACKED else 4 * tl.cdiv(num_in, BLOCK_K)):
        tap, c, k, valid = tap_and_channels(i, 4, num_in, BLOCK_K, PACKED)
        r, s = row[:, None] + phase // 2 - 1 + tap // 2, column[:, None] + phase % 2 - 1 + tap % 2
        left = load_pixels(x, frame, r, s, c, valid, height, width, num_in)
        inside = (o < num_out)[None, :] & valid[:, None]
        right = tl.load(weight + o[None, :] * (4 * num_in) + k[:, None], mask=inside, other=0.0)
        total = add_product(left, right, total)
    total += tl.load(bias + o, mask=o < num_out, other=0.0).to(tl.float32)[None, :]
    value, inside = total.to(y.dtype.element_ty), (place < num_pixels)[:, None] & (o < num_out)[None, :]
    size = 4 * tl.cast(height, tl.int64) * width
    away = (2 * row + phase // 2) * (2 * width) + 2 * column + phase % 2
    if DOUBLE:  # frame t of T is 2t and 2t + 1 of 2T, but 2t - 1 and 2t of 2T - 1, where the first comes once
        t, alone = frame % num_frames, num_frames % 2
        second = frame // num_frames * (2 * num_frames - alone) + 2 * t + 1 - alone
        target = y + (second * size + away)[:, None] * num_out + o[None, :]
        tl.store(target, value, mask=inside)
        tl.store(target - size * num_out, value, mask=inside & (t >= alone)[:, None])
    else:
        tl.store(y + (frame * size + away)[:, None] * num_out + o[None, :], value, mask=inside)


def why_not(x: Tensor, weight: Tensor, bias: Tensor, double_time: bool) -> str | None:
    if (reason := why_not_there(x)) is not None:
        return reason
    if x.dtype not in _DTYPES or any(t.dtype != x.dtype for t in (weight, bias)):
        return "every tensor must be of one dtype: float32, float16 or bfloat16"
    pixels = 8 * x.numel() // x.shape[1]
    return f"{pixels} pixels are above {_MAX_PIXELS}" if pixels > _MAX_PIXELS else why_not_merged(x)


def forward(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [C_out, C, 3, 3]
    bias: Tensor,  # [C_out]
    double_time: bool,
) -> Tensor:  # [B, C_out, T', 2H, 2W]
    x = x.contiguous(memory_format=torch.channels_last_3d)
    b, c, t, h, w = x.shape
    c_out = weight.shape[0]
    shape = (b, c_out, 2 * t - t % 2 if double_time else t, 2 * h, 2 * w)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    if y.numel():
        phases = _phases(weight)
        num_pixels, options = b * t * h * w, pixel_options(c, c_out, 4, x.dtype)
        grid = (triton.cdiv(num_pixels, options["BLOCK_M"]) * 4 * triton.cdiv(c_out, options["BLOCK_N"]),)
        with torch.cuda.device_of(x):
            forward_kernel[grid](
                x, phases, bias.contiguous(), y, num_pixels, t, h, w, c, c_out, DOUBLE=double_time, **options
            )
    return y


def scratch(x: Tensor, weight: Tensor, bias: Tensor, double_time: bool) -> list[Tensor]:
    return [_phases(weight)] if x.numel() else []


def _phases(weight: Tensor) -> Tensor:  # [C_out, C, 3, 3] -> [2, 2, C_out, 2, 2, C]
    """Of the merged taps M[p + 2a, q + 2e] at [p, q, C_out, a, e, C]."""
    return merge_taps(weight).unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(3, 5, 0, 2, 4, 1).contiguous()


def backward(
    grad: Tensor,  # [B, C_out, T', 2H, 2W]
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    double_time: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # of x, weight, bias
    grad_bias = grad.sum((0, 2, 3, 4), dtype=torch.float32).to(bias.dtype)
    grad = sum_pairs(grad) if double_time else grad
    grad, x = (t.contiguous(memory_format=torch.channels_last_3d) for t in (grad, x))
    # Gathered backwards: grad_x[i] = sum over k of grad[2i - 1 + k] W[k], with the merged taps W reversed.
    grad_x = torch.empty_like(x)
    if x.numel():
        gathered.gather(grad, merge_taps(weight).flip(2, 3).permute(1, 2, 3, 0).contiguous(), None, grad_x, pad=1)
    merged = gathered.weight_gradient(x, grad, k=4, pad=1).permute(3, 0, 1, 2).flip(2, 3)
    return grad_x, split_taps(merged).to(weight.dtype), grad_bias
