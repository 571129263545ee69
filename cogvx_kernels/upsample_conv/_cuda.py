"""`upsample_conv` in CUDA C++: four phases of merged `taps`, on tensor cores, over channels-last memory.

y[2i + p, 2j + q] is a 2x2 convolution of x. The gradient of x is the same backwards: a sum of 2x2 convolutions of the
gradient's four phases.
"""

import torch
from torch import Tensor

from .. import _extension
from .._convolution import block_of, in_tiles, in_vectors, splits_of
from .taps import merge_taps, split_taps, sum_pairs

FOR_DTYPES = (torch.bfloat16, torch.float16)


def why_not(x: Tensor, weight: Tensor, bias: Tensor, double_time: bool) -> str | None:
    if any(t.dtype != x.dtype for t in (weight, bias)):
        return f"every tensor must be {x.dtype}, as x is"
    return _extension.why_not_cuda(x, FOR_DTYPES)


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
        x, bias = in_vectors(x), bias.contiguous()
        tiles = in_tiles(_by_phase(weight).permute(3, 5, 0, 2, 4, 1).reshape(4, c_out, 1, 1, 4, -1))
        _extension.cuda().upsample_conv_forward(
            _extension.cuda_place(x), _extension.DTYPES[x.dtype], (b, x.shape[1], c_out, t, h, w, block_of(c_out)),
            double_time, x.data_ptr(), tiles.data_ptr(), bias.data_ptr(), y.data_ptr(),
        )  # fmt: skip
    return y


def backward(
    grad: Tensor,  # [B, C_out, T', 2H, 2W]
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    double_time: bool,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # of x, weight, bias
    grad_bias = grad.sum((0, 2, 3, 4), dtype=torch.float32).to(bias.dtype) if needs[2] else None
    grad = in_vectors(sum_pairs(grad) if double_time else grad)
    grad_x = _grad_x(grad, x, weight) if needs[0] else None
    return grad_x, _grad_weight(grad, x, weight) if needs[1] else None, grad_bias


def _by_phase(weight: Tensor) -> Tensor:  # [C_out, C, 3, 3] -> [C_out, C, a, p, e, q], M[p + 2a, q + 2e]
    return merge_taps(weight).unflatten(3, (2, 2)).unflatten(2, (2, 2))


def _grad_x(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    if x.numel():
        tiles = in_tiles(_by_phase(weight).flip(2, 4).permute(1, 3, 5, 2, 4, 0).reshape(1, c, 1, 4, 4, -1))
        _extension.cuda().upsample_conv_input(
            _extension.cuda_place(x), _extension.DTYPES[x.dtype], (b, grad.shape[1], c, t, h, w, block_of(c)),
            grad.data_ptr(), tiles.data_ptr(), grad_x.data_ptr(),
        )  # fmt: skip
    return grad_x


def _grad_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    c_out, c = weight.shape[:2]
    x = in_vectors(x)
    b, num_left, t, h, w = x.shape
    num_right = grad.shape[1]
    a_split, num_splits = splits_of(x, num_left, num_right, 16)
    partials = torch.empty(num_splits, num_left, 4, 4, num_right, dtype=torch.float32, device=x.device)
    if num_splits:
        _extension.cuda().upsample_conv_weight(
            _extension.cuda_place(x), _extension.DTYPES[x.dtype],
            (b, num_left, num_right, t, h, w, a_split, num_splits),
            x.data_ptr(), grad.data_ptr(), partials.data_ptr(),
        )  # fmt: skip
    # A tap of the gradient's pixels is one of M reversed.
    return split_taps(partials.sum(0)[:c, ..., :c_out].permute(3, 0, 1, 2).flip(2, 3)).to(weight.dtype)
