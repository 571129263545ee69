"""`group_norm_silu` in C++ for CPUs: x is read for the statistics, read again, and y is written where it belongs."""

import torch
from torch import Tensor

from .. import _extension
from .._extension import DTYPES
from .._group_norm import gradient_of_moments
from .._halo import behind_halo, dense, gradient_of_halo, sums_dtype


def why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    halo: Tensor | None,
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None,
) -> str | None:
    if weight.dtype != bias.dtype:
        return f"weight and bias must be of one dtype, not {weight.dtype} and {bias.dtype}"
    return _extension.why_not(x)


def forward(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    halo: Tensor | None,  # [B, C, num_halo, H, W]
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None,  # [B, 2, C]
) -> Tensor:  # [B, C, num_halo + T, H, W]
    y = behind_halo(x, halo, num_halo)
    if y.numel():
        x, weight, bias = dense(x, x), weight.contiguous(), bias.contiguous()
        _extension._C.group_norm_silu_forward(*_inputs(x, weight, bias, halo, num_groups, eps, num_halo), y.data_ptr())
    return y


def backward(
    grad: Tensor,  # [B, C, num_halo + T, H, W]
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    halo: Tensor | None,
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None,  # [B, 2, C]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # of x, weight, bias, halo, moments
    """The gradients, the same whatever the number of threads: values are added up in blocks of a fixed size."""
    grad, x, weight, bias = dense(grad, x), dense(x, x), weight.contiguous(), bias.contiguous()
    grad_x = torch.empty_like(x)
    sums = torch.zeros(2, len(weight), dtype=sums_dtype(x))
    if x.numel():
        _extension._C.group_norm_silu_backward(
            *_inputs(x, weight, bias, halo, num_groups, eps, num_halo),
            grad.data_ptr(), grad_x.data_ptr(), sums.dtype == torch.float64, sums[0].data_ptr(), sums[1].data_ptr(),
        )  # fmt: skip
    grad_weight, grad_bias = (g.to(weight.dtype, copy=True) for g in sums)
    return grad_x, grad_weight, grad_bias, gradient_of_halo(grad, halo), gradient_of_moments(moments)


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor, halo: Tensor | None, num_groups: int, eps: float, num_halo: int
) -> tuple:
    b, c, t, h, w = x.shape
    return (
        torch.get_num_threads(), (DTYPES[x.dtype], DTYPES[weight.dtype]), (b, c, t, h * w), not x.is_contiguous(),
        num_groups, eps, num_halo, num_halo if halo is None else 0, x.data_ptr(), weight.data_ptr(), bias.data_ptr(),
    )  # fmt: skip
