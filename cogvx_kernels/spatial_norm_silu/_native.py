"""`spatial_norm_silu` in C++ for CPUs: the latent's convolutions run at its size, beside the pixels that use them."""

import torch
from torch import Tensor

from .. import _extension
from .._extension import DTYPES
from .._group_norm import gradient_of_moments
from .._halo import behind_halo, dense, gradient_of_halo, sums_dtype
from .._op import _memory_format
from . import projection


def why_not(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_y: Tensor,
    bias_y: Tensor,
    weight_b: Tensor,
    bias_b: Tensor,
    halo: Tensor | None,
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None,  # [B, 2, C]
) -> str | None:
    if weight.dtype != bias.dtype:
        return f"weight and bias must be of one dtype, not {weight.dtype} and {bias.dtype}"
    return _extension.why_not(x)


def forward(
    x: Tensor,  # [B, C, T, H, W]
    z: Tensor,  # [B, C_z, T_z, H_z, W_z]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    weight_y: Tensor,  # [C, C_z]
    bias_y: Tensor,  # [C]
    weight_b: Tensor,  # [C, C_z]
    bias_b: Tensor,  # [C]
    halo: Tensor | None,  # [B, C, num_halo, H, W]
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None,  # [B, 2, C]
) -> Tensor:  # [B, C, num_halo + T, H, W]
    y = behind_halo(x, halo, num_halo)
    if y.numel():
        tensors = (
            dense(x, x),
            dense(z, x),
            *(t.contiguous() for t in (weight, bias, weight_y, bias_y, weight_b, bias_b)),
        )
        copies = num_halo if halo is None else 0
        _extension._C.spatial_norm_silu_forward(*_inputs(tensors, (num_groups, eps, num_halo, copies)), y.data_ptr())
    return y


def scratch(x: Tensor, z: Tensor, *others: Tensor | int | float | None) -> list[Tensor]:
    """The latent, where it is not in the order of x."""
    return [dense(z, x)] if x.numel() else []


def backward(
    grad: Tensor,  # [B, C, num_halo + T, H, W]
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_y: Tensor,
    bias_y: Tensor,
    weight_b: Tensor,
    bias_b: Tensor,
    halo: Tensor | None,
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None,  # [B, 2, C]
) -> tuple[Tensor | None, ...]:  # of x, z, weight, bias, weight_y, bias_y, weight_b, bias_b, halo, moments
    """The kernel adds up what the pixels of x say about each pixel of the latent; the rest are products."""
    grad, x, z = dense(grad, x), dense(x, x), dense(z, x)
    weights = tuple(t.contiguous() for t in (weight, bias, weight_y, bias_y, weight_b, bias_b))
    dtype, memory_format, size = sums_dtype(x), _memory_format(x), (len(z), x.shape[1], *z.shape[2:])
    grad_x, sums = torch.empty_like(x), torch.zeros(2, x.shape[1], dtype=dtype)
    at_latent = [torch.zeros(size, dtype=dtype).contiguous(memory_format=memory_format) for _ in range(2)]
    if x.numel():
        copies = num_halo if halo is None else 0
        _extension._C.spatial_norm_silu_backward(
            *_inputs((x, z, *weights), (num_groups, eps, num_halo, copies)), grad.data_ptr(), grad_x.data_ptr(),
            dtype == torch.float64, *(t.data_ptr() for t in (*sums, *at_latent)),
        )  # fmt: skip
    grad_weight, grad_bias = (g.to(weight.dtype, copy=True) for g in sums)
    grad_z, *of_projections = projection.gradients(z, weight_y, weight_b, *at_latent)
    grads = grad_x, grad_z, grad_weight, grad_bias, *of_projections
    return *grads, gradient_of_halo(grad, halo), gradient_of_moments(moments)


def _inputs(tensors: tuple[Tensor, ...], numbers: tuple[int, float, int, int]) -> tuple:
    x, z, weight = tensors[:3]
    return (
        torch.get_num_threads(), (DTYPES[x.dtype], DTYPES[weight.dtype]), x.shape, z.shape, not x.is_contiguous(),
        numbers, [t.data_ptr() for t in tensors],
    )  # fmt: skip
