"""Convolutions with step 2 in Triton, and the gradient of their weight, for `downsample_conv` and `upsample_conv`.

Implicit matrix products over channels-last memory. Where channels are too few for a block, one block holds several taps
(PACKED).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# The gradient of the weight is summed in splits: enough programs for any GPU, the same on all, so that sums are too.
_PROGRAMS, _LEAST_TILES = 1024, 16
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def add_product(left, right, total):
    if _INTERPRETED:  # it takes bfloat16 for integers, and its float32 sums depend on where in the tile a row stands
        return total + tl.dot(left.to(tl.float64), right.to(tl.float64)).to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def tap_and_channels(i, num_taps, num_channels, SIZE: tl.constexpr, PACKED: tl.constexpr):
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
def load_pixels(x, frame, row, column, c, valid, height, width, num_channels):
    """x[frame, row, column, c], or zeros outside the frame; rows and columns [pixels, 1] or [pixels, channels]."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & valid[None, :]
    places = (frame[:, None] * height + row) * width + column
    return tl.load(x + tl.cast(places, tl.int64) * num_channels + c[None, :], mask=inside, other=0.0)


@triton.jit
def gathered_kernel(
    x, weight, bias, y, num_pixels, height_in, width_in, height, width, num_in, num_out,
    K: tl.constexpr, PAD: tl.constexpr, HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[i] = sum over k of x[2i - PAD + k] weight[k] + bias; x [B T, H_in, W_in, C], weight [C_out, K K taps, C]."""
    tiles_n = tl.cdiv(num_out, BLOCK_N)  # neighbours share pixels
    o = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel = tl.minimum(place, num_pixels - 1)
    frame, row, column = pixel // (height * width), pixel // width % height, pixel % width
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(tl.cdiv(K * K * num_in, BLOCK_K) if PACKED else K * K * tl.cdiv(num_in, BLOCK_K)):
        tap, c, k, valid = tap_and_channels(i, K * K, num_in, BLOCK_K, PACKED)
        r, s = 2 * row[:, None] - PAD + tap // K, 2 * column[:, None] - PAD + tap % K
        left = load_pixels(x, frame, r, s, c, valid, height_in, width_in, num_in)
        inside = (o < num_out)[None, :] & valid[:, None]
        right = tl.load(weight + o[None, :] * (K * K * num_in) + k[:, None], mask=inside, other=0.0)
        total = add_product(left, right, total)
    if HAS_BIAS:
        total += tl.load(bias + o, mask=o < num_out, other=0.0).to(tl.float32)[None, :]
    inside = (place < num_pixels)[:, None] & (o < num_out)[None, :]
    target = y + place.to(tl.int64)[:, None] * num_out + o[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def weight_kernel(
    left, right, partials, num_pixels, height, width, height_right, width_right, num_left, num_right, tiles_a_split,
    K: tl.constexpr, PAD: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One split's sum over pixels of left[i] right[2i - PAD + k], for a tile of channels; [splits, L, K K taps, R]."""
    tiles_l = tl.cdiv(num_left, BLOCK_L)
    c = (tl.program_id(0) % tiles_l) * BLOCK_L + tl.arange(0, BLOCK_L)
    tap, o, k, valid = tap_and_channels(tl.program_id(0) // tiles_l, K * K, num_right, BLOCK_R, PACKED)
    total = tl.zeros([BLOCK_L, BLOCK_R], tl.float32)
    first = tl.program_id(1) * tiles_a_split
    for i in range(first, tl.minimum(first + tiles_a_split, tl.cdiv(num_pixels, BLOCK_P))):
        place = i * BLOCK_P + tl.arange(0, BLOCK_P)
        pixel = tl.minimum(place, num_pixels - 1)
        pixels = left + place.to(tl.int64)[None, :] * num_left + c[:, None]
        one = tl.load(pixels, mask=(place < num_pixels)[None, :] & (c < num_left)[:, None], other=0.0)
        frame, row, column = pixel // (height * width), pixel // width % height, pixel % width
        r, s = 2 * row[:, None] - PAD + tap // K, 2 * column[:, None] - PAD + tap % K
        other = load_pixels(right, frame, r, s, o, valid, height_right, width_right, num_right)
        total = add_product(one, other, total)
    partials += (tl.program_id(1).to(tl.int64) * num_left + c)[:, None] * (K * K * num_right) + k[None, :]
    tl.store(partials, total, mask=(c < num_left)[:, None] & valid[None, :])


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


def weight_options(num_left: int, num_right: int, num_taps: int, dtype: torch.dtype) -> dict:
    """The same for the weight's gradient."""
    low, packed = dtype != torch.float32, num_right < 16
    return {
        "PACKED": packed,
        "BLOCK_R": _block(num_taps * num_right if packed else num_right, 128 if low else 64),
        "BLOCK_L": _block(num_left, 128 if low else 64),
        "BLOCK_P": 64 if low and not packed else 32,
        "num_warps": 8 if low and max(num_left, num_right) > 64 else 4,
        "num_stages": 3,
        "enable_fp_fusion": True,
    }


def _block(size: int, largest: int) -> int:
    return max(16, min(triton.next_power_of_2(size), largest))  # a matrix product takes 16 at least


def gather(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, pad: int) -> None:
    """Write y[i] = sum over k of x[2i - pad + k] weight[k] + bias; x and y channels last, weight [C_out, K, K, C]."""
    b, c_out, t, h, w = y.shape
    c, k = x.shape[1], weight.shape[1]
    num_pixels, options = b * t * h * w, pixel_options(c, c_out, k * k, x.dtype)
    grid = (triton.cdiv(num_pixels, options["BLOCK_M"]) * triton.cdiv(c_out, options["BLOCK_N"]),)
    with torch.cuda.device_of(x):
        gathered_kernel[grid](
            x, weight, weight if bias is None else bias, y, num_pixels, *x.shape[3:], h, w, c, c_out,
            K=k, PAD=pad, HAS_BIAS=bias is not None, **options,
        )  # fmt: skip


def weight_gradient(left: Tensor, right: Tensor, k: int, pad: int) -> Tensor:  # [L, K, K, R], float32
    """The sum over pixels of left[i] right[2i - pad + k], of two videos with channels last."""
    b, num_left, t, h, w = left.shape
    num_right, num_taps = right.shape[1], k * k
    options = weight_options(num_left, num_right, num_taps, left.dtype)
    size = options["BLOCK_R"]
    tiles_r = triton.cdiv(num_taps * num_right, size) if options["PACKED"] else num_taps * triton.cdiv(num_right, size)
    programs = tiles_r * triton.cdiv(num_left, options["BLOCK_L"])
    num_tiles = triton.cdiv(b * t * h * w, options["BLOCK_P"])
    tiles_a_split = max(_LEAST_TILES, triton.cdiv(num_tiles, max(1, _PROGRAMS // programs)))
    num_splits = triton.cdiv(num_tiles, tiles_a_split)
    partials = torch.empty(num_splits, num_left, k, k, num_right, dtype=torch.float32, device=left.device)
    if num_tiles:
        with torch.cuda.device_of(left):
            weight_kernel[(programs, num_splits)](
                left, right, partials, b * t * h * w, h, w, *right.shape[3:], num_left, num_right, tiles_a_split,
                K=k, PAD=pad, **options,
            )  # fmt: skip
    return partials.sum(0)
