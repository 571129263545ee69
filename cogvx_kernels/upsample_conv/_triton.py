"""`upsample_conv` in Triton, for CUDA tensors, and for any tensor under TRITON_INTERPRET=1.

Implicit matrix products over channels-last memory, phase by phase with the merged `taps`: y[2i + p, 2j + q] is a 2x2
convolution of x. A program makes a tile of x's pixels in one phase, by some output channels, and writes it once or,
where frames come twice, twice. Where channels are too few for a block, one block holds several taps (PACKED).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .taps import merge_taps, split_taps, sum_pairs

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_PIXELS = 2**31 - 2**16  # of all frames of the result, which a kernel counts in 32 bits
# The gradient of the weight is summed in splits: enough programs for any GPU, the same on all, so that sums are too.
_PROGRAMS, _LEAST_TILES = 1024, 16
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _add_product(left, right, total):
    if _INTERPRETED:  # it takes bfloat16 for integers, and its float32 sums depend on where in the tile a row stands
        return total + tl.dot(left.to(tl.float64), right.to(tl.float64)).to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _tap_and_channels(i, num_taps, num_channels, SIZE: tl.constexpr, PACKED: tl.constexpr):
    """Of block i of (tap, channel): the tap, or with PACKED one a column [1, SIZE]; channels; rows; which are there."""
    if PACKED:
        k = i * SIZE + tl.arange(0, SIZE)
        tap, c, valid = (k // num_channels)[None, :], k % num_channels, k < num_taps * num_channels
    else:
        num_blocks = tl.cdiv(num_channels, SIZE)
        tap = i // num_blocks
        c = (i % num_blocks) * SIZE + tl.arange(0, SIZE)
        k, valid = tap * num_channels + c, c < num_channels
    return tap, c, k, valid


@triton.jit
def _load_pixels(x, frame, row, column, c, valid, height, width, num_channels):
    """x[frame, row, column, c], or zeros outside the frame; rows and columns [pixels, 1] or [pixels, channels]."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & valid[None, :]
    places = (frame[:, None] * height + row) * width + column
    return tl.load(x + tl.cast(places, tl.int64) * num_channels + c[None, :], mask=inside, other=0.0)


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
        tap, c, k, valid = _tap_and_channels(i, 4, num_in, BLOCK_K, PACKED)
        r, s = row[:, None] + phase // 2 - 1 + tap // 2, column[:, None] + phase % 2 - 1 + tap % 2
        left = _load_pixels(x, frame, r, s, c, valid, height, width, num_in)
        inside = (o < num_out)[None, :] & valid[:, None]
        right = tl.load(weight + o[None, :] * (4 * num_in) + k[:, None], mask=inside, other=0.0)
        total = _add_product(left, right, total)
    total += tl.load(bias + o, mask=o < num_out, other=0.0).to(tl.float32)[None, :]
    value, inside = total.to(y.dtype.element_ty), (place < num_pixels)[:, None] & (o < num_out)[None, :]
    size = 4 * height.to(tl.int64) * width
    away = (2 * row + phase // 2) * (2 * width) + 2 * column + phase % 2
    if DOUBLE:  # frame t of T is 2t and 2t + 1 of 2T, but 2t - 1 and 2t of 2T - 1, where the first comes once
        t, alone = frame % num_frames, num_frames % 2
        second = frame // num_frames * (2 * num_frames - alone) + 2 * t + 1 - alone
        target = y + (second * size + away)[:, None] * num_out + o[None, :]
        tl.store(target, value, mask=inside)
        tl.store(target - size * num_out, value, mask=inside & (t >= alone)[:, None])
    else:
        tl.store(y + (frame * size + away)[:, None] * num_out + o[None, :], value, mask=inside)


@triton.jit
def input_kernel(
    grad, weight, grad_x, num_pixels, height, width, num_in, num_out,
    PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_x[i] = sum over k of grad[2i - 1 + k] weight[k]; grad [B T, 2H, 2W, C_out], weight [C, 4 4 taps, C_out]."""
    tiles_n = tl.cdiv(num_in, BLOCK_N)
    c = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel = tl.minimum(place, num_pixels - 1)
    frame, row, column = pixel // (height * width), pixel // width % height, pixel % width
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(tl.cdiv(16 * num_out, BLOCK_K) if PACKED else 16 * tl.cdiv(num_out, BLOCK_K)):
        tap, o, k, valid = _tap_and_channels(i, 16, num_out, BLOCK_K, PACKED)
        r, s = 2 * row[:, None] - 1 + tap // 4, 2 * column[:, None] - 1 + tap % 4
        left = _load_pixels(grad, frame, r, s, o, valid, 2 * height, 2 * width, num_out)
        inside = (c < num_in)[None, :] & valid[:, None]
        right = tl.load(weight + c[None, :] * (16 * num_out) + k[:, None], mask=inside, other=0.0)
        total = _add_product(left, right, total)
    inside = (place < num_pixels)[:, None] & (c < num_in)[None, :]
    target = grad_x + place.to(tl.int64)[:, None] * num_in + c[None, :]
    tl.store(target, total.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def weight_kernel(
    grad, x, partials, num_pixels, height, width, num_in, num_out, tiles_a_split,
    PACKED: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One split's sum over pixels of grad[2i - 1 + k] x[i], for a tile of channels; [splits, C, 4 4 taps, C_out]."""
    tiles_c = tl.cdiv(num_in, BLOCK_C)
    c = (tl.program_id(0) % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    tap, o, k, valid = _tap_and_channels(tl.program_id(0) // tiles_c, 16, num_out, BLOCK_O, PACKED)
    total = tl.zeros([BLOCK_C, BLOCK_O], tl.float32)
    first = tl.program_id(1) * tiles_a_split
    for i in range(first, tl.minimum(first + tiles_a_split, tl.cdiv(num_pixels, BLOCK_P))):
        place = i * BLOCK_P + tl.arange(0, BLOCK_P)
        pixel = tl.minimum(place, num_pixels - 1)
        pixels = x + place.to(tl.int64)[None, :] * num_in + c[:, None]
        left = tl.load(pixels, mask=(place < num_pixels)[None, :] & (c < num_in)[:, None], other=0.0)
        frame, row, column = pixel // (height * width), pixel // width % height, pixel % width
        r, s = 2 * row[:, None] - 1 + tap // 4, 2 * column[:, None] - 1 + tap % 4
        right = _load_pixels(grad, frame, r, s, o, valid, 2 * height, 2 * width, num_out)
        total = _add_product(left, right, total)
    partials += (tl.program_id(1).to(tl.int64) * num_in + c)[:, None] * (16 * num_out) + k[None, :]
    tl.store(partials, total, mask=(c < num_in)[:, None] & valid[None, :])


def pixel_options(num_summed: int, num_made: int, num_taps: int, dtype: torch.dtype) -> dict:
    """The tile of a program that makes pixels; float32 is multiplied without tensor cores."""
    low, packed = (
        dtype != torch.float32,
        num_summed < 16,
    )  # where every value has a place of its own, registers are scarce
    return {
        "PACKED": packed,
        "BLOCK_M": 128 if low and not packed else 64,
        "BLOCK_N": _block(num_made, 128 if low else 64),
        "BLOCK_K": _block(num_taps * num_summed, 32) if packed else _block(num_summed, 64 if low else 16),
        "num_warps": 8 if low and num_made > 64 else 4,
        "num_stages": 3,
        "enable_fp_fusion": True,
    }


def weight_options(num_in: int, num_out: int, dtype: torch.dtype) -> dict:
    """The same for the weight's gradient."""
    low, packed = dtype != torch.float32, num_out < 16
    return {
        "PACKED": packed,
        "BLOCK_O": _block(16 * num_out if packed else num_out, 128 if low else 64),
        "BLOCK_C": _block(num_in, 128 if low else 64),
        "BLOCK_P": 64 if low and not packed else 32,
        "num_warps": 8 if low and max(num_in, num_out) > 64 else 4,
        "num_stages": 3,
        "enable_fp_fusion": True,
    }


def _block(size: int, largest: int) -> int:
    return max(16, min(triton.next_power_of_2(size), largest))  # a matrix product takes 16 at least


def why_not(x: Tensor, weight: Tensor, bias: Tensor, double_time: bool) -> str | None:
    if not (x.is_cuda or triton.knobs.runtime.interpret):
        return "Triton runs on CUDA tensors, or anywhere with TRITON_INTERPRET=1"
    if x.dtype not in _DTYPES or any(t.dtype != x.dtype for t in (weight, bias)):
        return "every tensor must be of one dtype: float32, float16 or bfloat16"
    pixels = 8 * x.numel() // x.shape[1]
    return f"{pixels} pixels are above {_MAX_PIXELS}" if pixels > _MAX_PIXELS else None


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
        # M[p + 2a, q + 2e] becomes [p, q, C_out, a, e, C].
        phases = merge_taps(weight).unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(3, 5, 0, 2, 4, 1).contiguous()
        num_pixels, options = b * t * h * w, pixel_options(c, c_out, 4, x.dtype)
        grid = (triton.cdiv(num_pixels, options["BLOCK_M"]) * 4 * triton.cdiv(c_out, options["BLOCK_N"]),)
        with torch.cuda.device_of(x):
            forward_kernel[grid](
                x, phases, bias.contiguous(), y, num_pixels, t, h, w, c, c_out, DOUBLE=double_time, **options
            )
    return y


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
    return _grad_x(grad, x, weight), _grad_weight(grad, x, weight), grad_bias


def _grad_x(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    c_out = weight.shape[0]
    grad_x = torch.empty_like(x)
    if x.numel():
        taps = merge_taps(weight).flip(2, 3).permute(1, 2, 3, 0).contiguous()
        num_pixels, options = b * t * h * w, pixel_options(c_out, c, 16, x.dtype)
        grid = (triton.cdiv(num_pixels, options["BLOCK_M"]) * triton.cdiv(c, options["BLOCK_N"]),)
        with torch.cuda.device_of(x):
            input_kernel[grid](grad, taps, grad_x, num_pixels, h, w, c, c_out, **options)
    return grad_x


def _grad_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    c_out = weight.shape[0]
    options = weight_options(c, c_out, x.dtype)
    size = options["BLOCK_O"]
    tiles_o = triton.cdiv(16 * c_out, size) if options["PACKED"] else 16 * triton.cdiv(c_out, size)
    programs = tiles_o * triton.cdiv(c, options["BLOCK_C"])
    num_tiles = triton.cdiv(b * t * h * w, options["BLOCK_P"])
    tiles_a_split = max(_LEAST_TILES, triton.cdiv(num_tiles, max(1, _PROGRAMS // programs)))
    num_splits = triton.cdiv(num_tiles, tiles_a_split)
    partials = torch.empty(num_splits, c, 4, 4, c_out, dtype=torch.float32, device=x.device)
    if num_tiles:
        with torch.cuda.device_of(x):
            weight_kernel[(programs, num_splits)](
                grad, x, partials, b * t * h * w, h, w, c, c_out, tiles_a_split, **options
            )
    # A tap of the gradient's pixels is one of M reversed.
    return split_taps(partials.sum(0).permute(3, 0, 1, 2).flip(2, 3)).to(weight.dtype)
