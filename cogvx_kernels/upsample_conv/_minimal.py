"""`upsample_conv` on CPUs by oneDNN, phase by phase: 16 of 36 products, nothing upsampled, each frame computed once.

With M of `taps`, y[2i + p, 2j + q] is a 2x2 convolution of x with M[p::2, q::2]. One transposed convolution with the
kernel M would do all phases at once, a little faster, but its sums depend on the number of threads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import _memory_format
from .taps import FOR_SHAPES, merge_taps, split_taps, sum_pairs, why_not_merged

__all__ = ["FOR_SHAPES"]
_EXACT_AS_STORED = (torch.float32, torch.float64)
_PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))
_PIXELS_AT_ONCE = 2**14  # of x: single frames are slower in oneDNN, and the fewer, the less is held twice


def why_not(x: Tensor, weight: Tensor, bias: Tensor, double_time: bool) -> str | None:
    return why_not_merged(x) if x.device.type == "cpu" else f"oneDNN convolves on CPUs, not on {x.device}"


def forward(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [C_out, C, 3, 3]
    bias: Tensor,  # [C_out]
    double_time: bool,
) -> Tensor:  # [B, C_out, T', 2H, 2W]
    b, _, t, h, w = x.shape
    alone = t % 2 if double_time else 0
    shape = (b, len(weight), 2 * t - alone if double_time else t, 2 * h, 2 * w)
    y = torch.empty(shape, dtype=x.dtype, memory_format=_memory_format(x))
    places = [(y[:, :, 1 - alone :: 2], 0), (y[:, :, alone::2], alone)] if double_time else [(y, 0)]
    taps = merge_taps(weight)
    # In float32 a bias comes last: a sum that begins with one much larger than its terms loses their last digits.
    first, last = (None, bias[:, None, None, None]) if x.dtype in _EXACT_AS_STORED else (bias, 0)
    step = max(1, _PIXELS_AT_ONCE // max(1, b * h * w))
    for p, q in _PHASES:
        phase = taps[:, :, p::2, q::2].contiguous()
        for i in range(0, t, step):
            part = F.conv2d(_frames(x[:, :, i : i + step]), phase, first, padding=1)[:, :, p : p + h, q : q + w]
            part = part.unflatten(0, (b, -1)) if b else part[None, :0]
            for place, num_skipped in places:  # where frames come twice, a first one that comes once has one place
                part_here = part[:, max(num_skipped - i, 0) :].transpose(1, 2)
                start = max(i - num_skipped, 0)
                torch.add(part_here, last, out=place[:, :, start : start + part_here.shape[2], p::2, q::2])
    return y


def backward(
    grad: Tensor,  # [B, C_out, T', 2H, 2W]
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    double_time: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # of x, weight, bias
    grad_bias = grad.sum((0, 2, 3, 4), dtype=torch.float64).to(bias.dtype)  # oneDNN's sum loses digits over many pixels
    grad = _frames(sum_pairs(grad) if double_time else grad)
    kernel = merge_taps(weight).flip(2, 3).transpose(0, 1)  # of the transposed convolution
    by_phase = x.dtype in _EXACT_AS_STORED
    grad_x, grad_kernel, _ = torch.ops.aten.convolution_backward(
        grad, _frames(x), kernel, list(bias.shape), [2, 2], [1, 1], [1, 1], True, [0, 0], 1,
        [not by_phase, True, False],
    )  # fmt: skip
    grad_weight = split_taps(grad_kernel.transpose(0, 1).flip(2, 3))
    grad_x = _grad_by_phase(grad, kernel) if by_phase else grad_x
    return grad_x.unflatten(0, x.shape[:3:2]).transpose(1, 2), grad_weight, grad_bias


def _grad_by_phase(grad: Tensor, kernel: Tensor) -> Tensor:  # [B T, C_out, 2H, 2W], [C, C_out, 4, 4] -> [B T, C, H, W]
    """The gradient of x from four sums a fourth as long: oneDNN adds one term after the other, 16 C_out of them."""
    h, w = grad.shape[2] // 2, grad.shape[3] // 2
    parts = (
        F.conv2d(grad[:, :, 1 - p :: 2, 1 - q :: 2], kernel[:, :, p::2, q::2], padding=1)[:, :, p : p + h, q : q + w]
        for p, q in _PHASES
    )
    a, b, c, d = parts
    return (a + b).add_(c + d)


def _frames(x: Tensor) -> Tensor:  # [B, C, T, H, W] -> [B T, C, H, W]
    return x.transpose(1, 2).flatten(0, 1)
