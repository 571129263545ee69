"""`group_norm_silu` in CUDA C++: x is read for the statistics, read again, and y is written where it belongs."""

import torch
from torch import Tensor

from .. import _extension
from .._group_norm import FOR_DTYPES, Stages, channels_last, finish_gradients, gradient_of_moments
from .._halo import behind_halo, gradient_of_halo, sums_dtype

__all__ = ["FOR_DTYPES", "backward", "forward", "why_not"]


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
    return _extension.why_not_cuda(x, FOR_DTYPES)


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
    y = behind_halo(x, halo, num_halo, torch.channels_last_3d)
    if y.numel():
        stages = Stages(channels_last(x), num_groups, eps, num_halo, num_halo if halo is None else 0, None)
        weight, bias = weight.float().contiguous(), bias.float().contiguous()
        stages("group_norm_silu_apply", y=y, weight=weight, bias=bias, statistics=stages.statistics(moments))
    return y


def scratch(
    x: Tensor, weight: Tensor, bias: Tensor, halo: Tensor | None, num_groups: int, eps: float, num_halo: int,
    moments: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    stages = Stages(x, num_groups, eps, num_halo, 0, None)
    return [weight.float(), bias.float(), *stages.scratch(moments)] if x.numel() else []


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
    """The gradients, the same in every run: values are added up in pieces of a fixed size."""
    grad, x = channels_last(grad), channels_last(x)
    grad_x = torch.empty_like(x)
    if not x.numel():
        nothing = torch.zeros_like(weight), torch.zeros_like(bias)
        return grad_x, *nothing, gradient_of_halo(grad, halo), gradient_of_moments(moments)
    in_double = sums_dtype(x) == torch.float64
    stages = Stages(x, num_groups, eps, num_halo, num_halo if halo is None else 0, None, in_double)
    partials = stages.partials(_extension.cuda().group_norm_pieces(stages.sizes))
    tensors = {"grad": grad, "weight": weight.float().contiguous(), "bias": bias.float().contiguous()}
    tensors["statistics"] = statistics = stages.statistics(None)
    stages("group_norm_silu_sums", partials=partials, **tensors)
    num_pixels = x[0, 0].numel()
    grad_weight, grad_bias, ends = finish_gradients(partials.sum(1), statistics, weight, num_groups, num_pixels)
    stages("group_norm_silu_gradient", ends=ends, grad_x=grad_x, **tensors)
    return grad_x, grad_weight, grad_bias.to(bias.dtype), gradient_of_halo(grad, halo), gradient_of_moments(moments)
