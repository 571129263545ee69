"""`downsample_conv` on CPUs by oneDNN, without a copy of the input that has one row and one column of zeros more.

oneDNN pads for PyTorch on both sides or on none. So the results that no padding reaches are one convolution of x as it
is, and the last row and column, where H or W is even, are convolutions of a copy of x's last few.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import _memory_format

_EXACT_AS_STORED = (torch.float32, torch.float64)
_ONE_SIDE = (0, 1, 0, 1)
_EDGE = 2  # rows or columns of x that the last ones of the result read, besides the zeros


def why_not(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    return None if x.device.type == "cpu" else f"oneDNN convolves on CPUs, not on {x.device}"


def forward(
    x: Tensor,  # [B, C, T, H, W], H and W at least 2
    weight: Tensor,  # [C_out, C, 3, 3]
    bias: Tensor,  # [C_out]
) -> Tensor:  # [B, C_out, T, H / 2, W / 2], rounded down
    b, _, t, h, w = x.shape
    inner_h, inner_w = (h - 1) // 2, (w - 1) // 2
    y = torch.empty((b, len(weight), t, h // 2, w // 2), dtype=x.dtype, memory_format=_memory_format(x))
    if not y.numel():
        return y
    frames = _frames(x)

    # In float32 a bias comes last: a sum that begins with one much larger than its terms loses their last digits.
    first, last = (None, bias[:, None, None, None]) if x.dtype in _EXACT_AS_STORED else (bias, 0)

    def conv(part: Tensor) -> Tensor:
        return F.conv2d(part, weight, first, stride=2).unflatten(0, (b, t)).transpose(1, 2)

    if inner_h and inner_w:
        torch.add(conv(frames), last, out=y[..., :inner_h, :inner_w])
    if h % 2 == 0:
        torch.add(conv(F.pad(frames[:, :, -_EDGE:], _ONE_SIDE))[..., -1:, :], last, out=y[..., inner_h:, :])
    if w % 2 == 0 and inner_h:
        edge = conv(F.pad(frames[..., -_EDGE:], _ONE_SIDE))[..., :inner_h, -1:]
        torch.add(edge, last, out=y[..., :inner_h, inner_w:])
    return y


def backward(
    grad: Tensor,  # [B, C_out, T, H / 2, W / 2]
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # of x, weight, bias
    grad_x, grad_weight, grad_bias = None, None, None
    if needs[0] or needs[1]:
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            _frames(grad), F.pad(_frames(x), _ONE_SIDE), weight, None, [2, 2], [0, 0], [1, 1], False, [0, 0], 1,
            [needs[0], needs[1], False],
        )  # fmt: skip
    if needs[0]:
        grad_x = grad_x[..., : x.shape[3], : x.shape[4]].unflatten(0, x.shape[:3:2]).transpose(1, 2)
    if needs[2]:  # oneDNN's sum loses digits over many pixels
        grad_bias = grad.sum((0, 2, 3, 4), dtype=torch.float64).to(bias.dtype)
    return grad_x, grad_weight, grad_bias


def _frames(x: Tensor) -> Tensor:  # [B, C, T, H, W] -> [B T, C, H, W]
    return x.transpose(1, 2).flatten(0, 1)
