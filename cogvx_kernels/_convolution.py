"""The CUDA convolutions and what they take: whole vectors of channels, weights in the order in which they stream."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _extension

FOR_DTYPES = (torch.bfloat16, torch.float16)
FOR_SHAPES = "kernels of up to 9 x 9 in a frame"  # of causal convolutions
_LARGEST = 9
_VECTOR = 8  # channels of 16 bytes
# The gradient of a weight is summed in splits: enough blocks for any GPU, the same on all, so that sums are too.
_BLOCKS, _LEAST_PATCHES = 1024, 16


def in_vectors(x: Tensor) -> Tensor:  # [B, C, T, H, W] -> the same in channels-last memory, C filled up to a vector
    """`x` itself where it is so already: aligned to 16 bytes and of whole vectors of channels."""
    c = x.shape[1]
    if c % _VECTOR == 0:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return x if x.data_ptr() % 16 == 0 else x.clone()
    shape = (x.shape[0], -(-c // _VECTOR) * _VECTOR, *x.shape[2:])
    filled = torch.zeros(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=torch.channels_last_3d)
    filled[:, :c] = x
    return filled


def filled_up(*tensors: Tensor | None) -> list[Tensor]:
    """Those in whole vectors of which `in_vectors` makes copies for want of channels."""
    return [in_vectors(x) for x in tensors if x is not None and x.shape[1] % _VECTOR]


def block_of(num_out: int) -> int:
    """The output channels of a tile."""
    wide, narrow = _extension.cuda().CONVOLUTION_BLOCKS
    return narrow if num_out <= narrow else wide


def in_tiles(weight: Tensor) -> Tensor:  # [C_out, C, K_t, taps] -> [tiles, K_t, depths, taps, block, depth]
    """A weight in the order in which a tile of the result takes it, with zeros where a tile is not full."""
    c_out, c = weight.shape[:2]
    block, depth = block_of(c_out), _extension.cuda().CONVOLUTION_DEPTH
    if c % depth or c_out % block:
        weight = F.pad(weight, (0, 0, 0, 0, 0, -c % depth, 0, -c_out % block))
    return weight.unflatten(1, (-1, depth)).unflatten(0, (-1, block)).permute(0, 4, 2, 5, 1, 3).contiguous()


def in_tiles_gathered(weight: Tensor, pad: int) -> Tensor:  # [C_out, C, K_h, K_w]
    """The same for y[i] = sum over k of x[2i + k - pad] weight[k], its taps sorted by the phase of x that they read."""
    return in_tiles(torch.cat([phase.flatten(2) for phase in _phases(weight, pad)], dim=2)[:, :, None])


def in_tiles_spread(weight: Tensor, pad: int) -> Tensor:  # [C_out, C, K_h, K_w]
    """The same for its transpose, y[2i + k - pad] += x[i] weight[k]: the tiles of each phase of y, flat."""
    phases = (phase.flip(2, 3).flatten(2)[:, :, None] for phase in _phases(weight, pad))
    return torch.cat([in_tiles(phase).flatten() for phase in phases])


def _phases(weight: Tensor, pad: int) -> list[Tensor]:
    return [weight[:, :, (p + pad) % 2 :: 2, (q + pad) % 2 :: 2] for p in range(2) for q in range(2)]


def convolve(
    kernel: Callable[..., None],  # of the extension
    x: Tensor,  # [B, C, T, H, W]
    tiles: Tensor,  # the weight in tiles
    y: Tensor,  # [B, C_out, T', H', W'], channels last
    taps: tuple[int, int, int],
    pads: tuple[int, int, int],
    bias: Tensor | None = None,  # [C_out]
    residual: Tensor | None = None,  # as y
    repeated: bool = False,
    moments: Tensor | None = None,  # [B, tiles, 3, C_out], of a kernel that measures
) -> None:
    """Write y, or with `repeated` each frame of it twice; what the kernel computes, `common/convolution.h` says."""
    x, bias = in_vectors(x), None if bias is None else bias.contiguous()
    residual = None if residual is None else in_vectors(residual)
    frames_out = x.shape[2] + 2 * pads[0] - taps[0] + 1
    sizes = (*x.shape[:2], y.shape[1], x.shape[2], frames_out, pads[0], *x.shape[3:], *y.shape[3:], *taps, *pads[1:])
    tensors = (0 if t is None else t.data_ptr() for t in (x, tiles, bias, residual, y, moments))
    place, dtype = _extension.cuda_place(x), _extension.DTYPES[x.dtype]
    kernel(place, dtype, (*sizes, block_of(y.shape[1])), repeated, tuple(tensors))


def why_not_causally(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> str | None:
    """The reason why a causal convolution cannot run here, or None."""
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias, residual)):
        return f"every tensor must be {x.dtype}, as x is"
    if max(weight.shape[3:], default=0) > _LARGEST:
        return f"the CUDA kernel is for {FOR_SHAPES}, not {list(weight.shape[3:])}"
    return _extension.why_not_cuda(x, FOR_DTYPES)


def convolve_causally(
    kernel: Callable[..., None],
    x: Tensor,  # [B, C, frames, H, W]
    weight: Tensor,  # [C_out, C, K_t, K_h, K_w], odd K_h and K_w
    bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # as the result
    pad_t: int = 0,
    moments: Tensor | None = None,
) -> Tensor:  # [B, C_out, frames + 2 pad_t - K_t + 1, H, W]
    """The convolution with `pad_t` frames of zeros on both sides of x, frames of their own size; else as `convolve`."""
    b, _, frames_in, h, w = x.shape
    c_out, _, k_t, k_h, k_w = weight.shape
    shape = (b, c_out, frames_in + 2 * pad_t - k_t + 1, h, w)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    if y.numel():
        pads = (pad_t, k_h // 2, k_w // 2)
        convolve(kernel, x, in_tiles(weight.flatten(3)), y, (k_t, k_h, k_w), pads, bias, residual, moments=moments)
    return y


def scratch_causally(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> list[Tensor]:
    """What a causal convolution holds beside its result, not filled."""
    return [in_tiles(weight.flatten(3)), *filled_up(x, residual)] if x.numel() and len(weight) else []


def weight_gradient(
    kernel: Callable[..., None],
    left: Tensor,  # [B, M, T, H, W]
    right: Tensor,  # [B, N, K_t - 1 + T, H', W']
    taps: tuple[int, int, int],
    pads: tuple[int, int],
    step: int = 1,
) -> Tensor:  # [M, K_t, K_h, K_w, N], float32
    """The sum over pixels of left[t, r, s] right[t + k_t, step r + k_h - pad_h, step s + k_w - pad_w]."""
    num_left, num_right = left.shape[1], right.shape[1]
    left, right = in_vectors(left), in_vectors(right)
    b, m, *size = left.shape
    a_split, num_splits = _splits_of(left, m, right.shape[1], taps[0] * taps[1] * taps[2])
    partials = torch.empty(num_splits, m, *taps, right.shape[1], dtype=torch.float32, device=left.device)
    if num_splits:
        sizes = (b, m, right.shape[1], *size, *right.shape[3:], *taps, *pads, step, a_split, num_splits)
        tensors = (left.data_ptr(), right.data_ptr(), partials.data_ptr())
        kernel(_extension.cuda_place(left), _extension.DTYPES[left.dtype], sizes, tensors)
    return partials.sum(0)[:num_left, ..., :num_right]


def _splits_of(left: Tensor, num_left: int, num_right: int, num_taps: int) -> tuple[int, int]:
    """Of the sum over the pixels of `left`: patches a split, and splits."""
    rows, columns = _extension.cuda().CONVOLUTION_WEIGHT_PATCH
    b, _, t, h, w = left.shape
    patches = b * t * -(-h // rows) * -(-w // columns)
    wide = _extension.cuda().CONVOLUTION_BLOCKS[0]
    blocks = num_taps * -(-num_left // wide) * -(-num_right // wide)
    a_split = max(_LEAST_PATCHES, -(-patches // max(1, _BLOCKS // blocks)))
    return a_split, -(-patches // a_split)
