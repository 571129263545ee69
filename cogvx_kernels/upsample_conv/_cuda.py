"""`upsample_conv` in CUDA C++: a transposed convolution with the merged `taps`, on tensor cores, channels last.

Reversed, the 4x4 merged taps W give y[2i + k - 1] += x[i] W[k]: a phase of y is a 2x2 convolution of x. The gradient of
x is the same backwards, grad_x[i] = sum over k of grad[2i + k - 1] W[k].
"""

import torch
from torch import Tensor

from .. import _extension
from .._convolution import convolve, filled_up, in_tiles_gathered, in_tiles_spread, weight_gradient
from .taps import FOR_SHAPES, merge_taps, split_taps, sum_pairs, why_not_merged

__all__ = ["FOR_SHAPES"]
FOR_DTYPES = (torch.bfloat16, torch.float16)
_TAPS, _PADS = (1, 4, 4), (0, 1, 1)


def why_not(x: Tensor, weight: Tensor, bias: Tensor, double_time: bool) -> str | None:
    if any(t.dtype != x.dtype for t in (weight, bias)):
        return f"every tensor must be {x.dtype}, as x is"
    return _extension.why_not_cuda(x, FOR_DTYPES) or why_not_merged(x)


def forward(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [C_out, C, 3, 3]
    bias: Tensor,  # [C_out]
    double_time: bool,
) -> Tensor:  # [B, C_out, T', 2H, 2W]
    b, _, t, h, w = x.shape
    c_out = weight.shape[0]
    shape = (b, c_out, 2 * t - t % 2 if double_time else t, 2 * h, 2 * w)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    if y.numel():
        tiles = _tiles(weight)
        kernel = _extension.cuda().upsample_conv_forward
        convolve(kernel, x, tiles, y, _TAPS, _PADS, bias, repeated=double_time)
    return y


def scratch(x: Tensor, weight: Tensor, bias: Tensor, double_time: bool) -> list[Tensor]:
    return [_tiles(weight), *filled_up(x)] if x.numel() and len(weight) else []


def _tiles(weight: Tensor) -> Tensor:
    return in_tiles_spread(merge_taps(weight).flip(2, 3), pad=1)


def backward(
    grad: Tensor,  # [B, C_out, T', 2H, 2W]
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    double_time: bool,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # of x, weight, bias
    grad_bias = grad.sum((0, 2, 3, 4), dtype=torch.float32).to(bias.dtype) if needs[2] else None
    grad = sum_pairs(grad) if double_time else grad
    grad_x, grad_weight = None, None
    if needs[0]:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        if x.numel():
            tiles = in_tiles_gathered(merge_taps(weight).flip(2, 3).transpose(0, 1), pad=1)
            convolve(_extension.cuda().upsample_conv_input, grad, tiles, grad_x, _TAPS, _PADS)
    if needs[1]:
        merged = weight_gradient(_extension.cuda().upsample_conv_weight, x, grad, _TAPS, _PADS[1:], step=2)
        grad_weight = split_taps(merged[:, 0].permute(3, 0, 1, 2).flip(2, 3)).to(weight.dtype)
    return grad_x, grad_weight, grad_bias
