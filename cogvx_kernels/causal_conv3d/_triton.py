"""`causal_conv3d` in Triton, for CUDA tensors, and for any tensor under TRITON_INTERPRET=1.

An implicit matrix product over channels-last memory: a program makes a tile of pixels by some output channels, and adds
up taps, in blocks of input channels, always in the same order. So where a frame stands in its chunk changes no bit of
it. Where the channels are too few for a block, one block holds several taps (PACKED).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_device import why_not_there

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_PIXELS = 2**31 - 2**16  # of all frames, which a kernel counts in 32 bits
# The gradient of the weight is summed in splits: enough programs for any GPU, the same on all, so that sums are too.
_PROGRAMS, _LEAST_TILES = 1024, 16
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _add_product(left, right, total):
    if _INTERPRETED:  # it takes bfloat16 for integers, and its float32 sums depend on where in the tile a row stands
        return total + tl.dot(left.to(tl.float64), right.to(tl.float64)).to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _load_pixels(
    x, pixel, source, c, tap, valid, frames_in, frames_out, height, width, num_in,
    PAD_T: tl.constexpr, K_T: tl.constexpr, K_H: tl.constexpr, K_W: tl.constexpr,
):  # fmt: skip
    """What a tap of each output pixel reads, or zeros outside the frames; a tap a column, or one for all columns.

    `source` is where in x the output pixel itself lies.
    """
    t = (pixel // (height * width) % frames_out)[:, None] + tap // (K_H * K_W) - PAD_T
    row = (pixel // width % height)[:, None] + tap // K_W % K_H - K_H // 2
    column = (pixel % width)[:, None] + tap % K_W - K_W // 2
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & valid[None, :]
    if PAD_T > 0:
        inside &= (t >= 0) & (t < frames_in)
    away = (tap // (K_H * K_W) - PAD_T) * height * width + (tap // K_W % K_H - K_H // 2) * width + tap % K_W - K_W // 2
    return tl.load(x + source[:, None] * num_in + (tl.cast(away, tl.int64) * num_in + c[None, :]), inside, other=0.0)


@triton.jit
def forward_kernel(
    x, weight, bias, residual, y, num_pixels, frames_in, frames_out, height, width, num_in, num_out,
    PAD_T: tl.constexpr, K_T: tl.constexpr, K_H: tl.constexpr, K_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[t] = sum over k of x[t + k - PAD_T] weight[k] + residual[t]; x [B, T_in, H, W, C], weight [C_out, taps, C]."""
    num_taps: tl.constexpr = K_T * K_H * K_W
    tiles_n = tl.cdiv(num_out, BLOCK_N)  # neighbours share pixels, which are the larger operand
    o = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = (tl.program_id(0) // tiles_n) * BLOCK_M
    place = start + tl.arange(0, BLOCK_M)
    pixel = tl.minimum(place, num_pixels - 1)
    b = pixel // (height * width) // frames_out
    source = pixel + (b * (frames_in - frames_out) * height * width).to(tl.int64)
    num_blocks = tl.cdiv(num_taps * num_in, BLOCK_K) if PACKED else tl.cdiv(num_in, BLOCK_K)
    first, last = 0, num_blocks if PACKED else num_taps * num_blocks
    if PAD_T > 0 and not PACKED:  # a tile of one frame skips the taps that lie before the first frame or after the last
        frame, end = start // (height * width), (start + BLOCK_M - 1) // (height * width)
        t = frame % frames_out
        least, most = tl.maximum(PAD_T - t, 0), tl.minimum(frames_in + PAD_T - t, K_T)
        first = tl.where(frame == end, least, 0) * (K_H * K_W) * num_blocks
        last = tl.where(frame == end, most, K_T) * (K_H * K_W) * num_blocks
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(first, last):
        if PACKED:
            k = i * BLOCK_K + tl.arange(0, BLOCK_K)
            c, valid, tap = k % num_in, k < num_taps * num_in, (k // num_in)[None, :]
        else:
            tap = i // num_blocks
            c = (i % num_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
            k, valid = tap * num_in + c, c < num_in
        left = _load_pixels(
            x, pixel, source, c, tap, valid, frames_in, frames_out, height, width, num_in, PAD_T, K_T, K_H, K_W
        )
        inside = (o < num_out)[None, :] & valid[:, None]
        right = tl.load(weight + o.to(tl.int64)[None, :] * (num_taps * num_in) + k[:, None], mask=inside, other=0.0)
        total = _add_product(left, right, total)
    if HAS_BIAS:
        total += tl.load(bias + o, mask=o < num_out, other=0.0).to(tl.float32)[None, :]
    inside = (place < num_pixels)[:, None] & (o < num_out)[None, :]
    target = place.to(tl.int64)[:, None] * num_out + o[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + target, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + target, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def weight_kernel(
    grad, x, partials, num_pixels, frames_in, frames_out, height, width, num_in, num_out, tiles_a_split,
    K_T: tl.constexpr, K_H: tl.constexpr, K_W: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One split's sum over pixels p of grad[p] x[p + tap], for a tile of channels; [splits, C_out, taps, C]."""
    num_taps: tl.constexpr = K_T * K_H * K_W
    tiles_o = tl.cdiv(num_out, BLOCK_O)
    o = (tl.program_id(0) % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    tile = tl.program_id(0) // tiles_o
    if PACKED:
        k = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        c, valid, tap = k % num_in, k < num_taps * num_in, (k // num_in)[None, :]
    else:
        tap = tile % num_taps  # neighbours share pixels
        c = tile // num_taps * BLOCK_C + tl.arange(0, BLOCK_C)
        k, valid = tap * num_in + c, c < num_in
    total = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    first = tl.program_id(1) * tiles_a_split
    for i in range(first, tl.minimum(first + tiles_a_split, tl.cdiv(num_pixels, BLOCK_P))):
        place = i * BLOCK_P + tl.arange(0, BLOCK_P)
        pixel = tl.minimum(place, num_pixels - 1)
        grads = grad + pixel.to(tl.int64)[None, :] * num_out + o[:, None]
        left = tl.load(grads, mask=(place < num_pixels)[None, :] & (o < num_out)[:, None], other=0.0)
        b = pixel // (height * width) // frames_out
        source = pixel + (b * (frames_in - frames_out) * height * width).to(tl.int64)
        right = _load_pixels(
            x, pixel, source, c, tap, valid, frames_in, frames_out, height, width, num_in, 0, K_T, K_H, K_W
        )
        total = _add_product(left, right, total)
    partials += (tl.program_id(1).to(tl.int64) * num_out + o)[:, None] * (num_taps * num_in) + k[None, :]
    tl.store(partials, total, mask=(o < num_out)[:, None] & valid[None, :])


def forward_options(num_in: int, num_out: int, num_taps: int, dtype: torch.dtype) -> dict:
    """The tile of a forward program and its compile-time arguments; float32 is multiplied without tensor cores."""
    low, packed = dtype != torch.float32, num_in < 16  # where every value has a place of its own, registers are scarce
    return {
        "PACKED": packed,
        "BLOCK_M": 128 if low and not packed else 64,
        "BLOCK_N": _block(num_out, 128 if low else 64),
        "BLOCK_K": _block(num_taps * num_in, 32) if packed else _block(num_in, 64 if low else 16),
        "num_warps": 8 if low and num_out > 64 else 4,
        "num_stages": 3 if low else 2,  # with a third float32 spills registers on sm_80
        "enable_fp_fusion": True,
    }


def weight_options(num_in: int, num_out: int, num_taps: int, dtype: torch.dtype) -> dict:
    """The same for the weight's gradient."""
    low, packed = dtype != torch.float32, num_in < 16
    return {
        "PACKED": packed,
        "BLOCK_O": _block(num_out, 128 if low else 64),
        "BLOCK_C": _block(num_taps * num_in if packed else num_in, 128 if low else 64),
        "BLOCK_P": 64 if low and not packed else 32,
        "num_warps": 8 if low and max(num_in, num_out) > 64 else 4,
        "num_stages": 3,
        "enable_fp_fusion": True,
    }


def _block(size: int, largest: int) -> int:
    return max(16, min(triton.next_power_of_2(size), largest))  # a matrix product takes 16 at least


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> str | None:
    if (reason := why_not_there(x)) is not None:
        return reason
    if x.dtype not in _DTYPES or any(t is not None and t.dtype != x.dtype for t in (weight, bias, residual)):
        return "every tensor must be of one dtype: float32, float16 or bfloat16"
    pixels = x.numel() // x.shape[1]
    return f"{pixels} pixels are above {_MAX_PIXELS}" if pixels > _MAX_PIXELS else None


def forward(
    x: Tensor,  # [B, C, K_t - 1 + T, H, W]: the halo, then the chunk
    weight: Tensor,  # [C_out, C, K_t, K_h, K_w], odd K_h and K_w
    bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, T, H, W]
) -> Tensor:  # [B, C_out, T, H, W]
    return _convolve(x, weight, bias, residual, 0)


def scratch(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> list[Tensor]:
    """The weight with its channels last."""
    return [weight.contiguous(memory_format=torch.channels_last_3d)] if x.numel() else []


def backward(
    grad: Tensor,  # [B, C_out, T, H, W]
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # of x, weight, bias, residual
    """The gradients; that of x, the halo's included, is a convolution of grad with the weight reversed."""
    grad_x = _convolve(grad, weight.flip(2, 3, 4).transpose(0, 1), None, None, weight.shape[2] - 1)
    grad_bias = None if bias is None else grad.sum((0, 2, 3, 4), dtype=torch.float32).to(bias.dtype)
    return grad_x, _grad_weight(grad, x, weight), grad_bias, grad


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, pad_t: int) -> Tensor:
    """The convolution with `pad_t` frames of zeros on both sides of x."""
    x, weight = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, weight))
    b, c, frames_in, h, w = x.shape
    c_out, _, k_t, k_h, k_w = weight.shape
    frames_out = frames_in + 2 * pad_t - k_t + 1
    shape = (b, c_out, frames_out, h, w)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    if y.numel():
        num_pixels = b * frames_out * h * w
        options = forward_options(c, c_out, k_t * k_h * k_w, x.dtype)
        grid = (triton.cdiv(num_pixels, options["BLOCK_M"]) * triton.cdiv(c_out, options["BLOCK_N"]),)
        options |= {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None}
        bias = weight if bias is None else bias.contiguous()
        residual = weight if residual is None else residual.contiguous(memory_format=torch.channels_last_3d)
        with torch.cuda.device_of(x):
            forward_kernel[grid](
                x, weight, bias, residual, y,
                num_pixels, frames_in, frames_out, h, w, c, c_out,
                PAD_T=pad_t, K_T=k_t, K_H=k_h, K_W=k_w, **options,
            )  # fmt: skip
    return y


def _grad_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    grad, x = (t.contiguous(memory_format=torch.channels_last_3d) for t in (grad, x))
    _, c, frames_in, h, w = x.shape
    c_out, _, k_t, k_h, k_w = weight.shape
    num_pixels, num_taps = grad.numel() // c_out, k_t * k_h * k_w
    options = weight_options(c, c_out, num_taps, x.dtype)
    size = options["BLOCK_C"]
    tiles_c = triton.cdiv(num_taps * c, size) if options["PACKED"] else num_taps * triton.cdiv(c, size)
    programs = triton.cdiv(c_out, options["BLOCK_O"]) * tiles_c
    num_tiles = triton.cdiv(num_pixels, options["BLOCK_P"])
    tiles_a_split = max(_LEAST_TILES, triton.cdiv(num_tiles, max(1, _PROGRAMS // programs)))
    num_splits = triton.cdiv(num_tiles, tiles_a_split)
    partials = torch.empty(num_splits, c_out, k_t, k_h, k_w, c, dtype=torch.float32, device=x.device)
    if num_tiles:
        with torch.cuda.device_of(x):
            weight_kernel[(programs, num_splits)](
                grad, x, partials, num_pixels, frames_in, grad.shape[2], h, w, c, c_out, tiles_a_split,
                K_T=k_t, K_H=k_h, K_W=k_w, **options,
            )  # fmt: skip
    return partials.sum(0).permute(0, 4, 1, 2, 3).to(weight.dtype)
