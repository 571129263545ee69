"""`spatial_norm_silu` in CUDA C++: `group_norm_silu` by stages that look up scale and shift at the latent's size."""

import torch
from torch import Tensor

from .. import _extension
from .._group_norm import FOR_DTYPES, Stages, channels_last, finish_gradients, gradient_of_moments
from .._halo import behind_halo, gradient_of_halo, sums_dtype
from . import projection

__all__ = ["FOR_DTYPES", "backward", "forward", "why_not"]


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
    return _extension.why_not_cuda(x, FOR_DTYPES)


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
    y = behind_halo(x, halo, num_halo, torch.channels_last_3d)
    if y.numel():
        latent = _project(z, weight_y, bias_y, weight_b, bias_b)
        stages = Stages(channels_last(x), num_groups, eps, num_halo, num_halo if halo is None else 0, latent)
        weight, bias = weight.float().contiguous(), bias.float().contiguous()
        statistics = stages.statistics(moments)
        stages("spatial_norm_silu_apply", y=y, weight=weight, bias=bias, statistics=statistics, latent=latent)
    return y


def scratch(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, *others: Tensor | int | float | None) -> list[Tensor]:
    """Scale and shift of every latent pixel, the weights as they are read, and the statistics."""
    num_groups, eps, num_halo, moments = others[-4:]
    if not x.numel():
        return []
    latent = z.new_empty(len(z), *z.shape[2:], 2 * len(weight))
    stages = Stages(x, num_groups, eps, num_halo, 0, latent)
    return [latent, weight.float(), bias.float(), *stages.scratch(moments)]


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
    """The gradients, the same in every run: a thread adds up the pixels of a latent one, and blocks have an order."""
    grad, x = channels_last(grad), channels_last(x)
    grad_x, dtype = torch.empty_like(x), sums_dtype(x)
    at_latent = torch.empty(len(z), *z.shape[2:], 2 * x.shape[1], dtype=dtype, device=x.device)  # of scale and shift
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight)
    if x.numel():
        latent = _project(z, weight_y, bias_y, weight_b, bias_b)
        copies = num_halo if halo is None else 0
        stages = Stages(x, num_groups, eps, num_halo, copies, latent, dtype == torch.float64)
        partials = stages.partials(_extension.cuda().spatial_norm_silu_blocks(stages.sizes))
        tensors = {"grad": grad, "weight": weight.float().contiguous(), "bias": bias.float().contiguous()}
        tensors |= {"latent": latent, "statistics": (statistics := stages.statistics(None))}
        stages("spatial_norm_silu_sums", partials=partials, grad_latent=at_latent, **tensors)
        num_pixels = x[0, 0].numel()
        grad_weight, grad_bias, ends = finish_gradients(partials.sum(1), statistics, weight, num_groups, num_pixels)
        stages("spatial_norm_silu_gradient", ends=ends, grad_x=grad_x, **tensors)
    grad_z, *of_projections = projection.gradients(z, weight_y, weight_b, *at_latent.movedim(-1, 1).chunk(2, dim=1))
    grads = grad_x, grad_z, grad_weight, grad_bias.to(bias.dtype), *of_projections
    return *grads, gradient_of_halo(grad, halo), gradient_of_moments(moments)


def _project(
    z: Tensor, weight_y: Tensor, bias_y: Tensor, weight_b: Tensor, bias_b: Tensor
) -> Tensor:  # [B, T_z, H_z, W_z, 2 C]
    """Scale and shift of every latent pixel."""
    tensors = [z.movedim(1, -1).contiguous(), *(t.contiguous() for t in (weight_y, bias_y, weight_b, bias_b))]
    b, t, h, w, depth = tensors[0].shape
    latent = z.new_empty(b, t, h, w, 2 * len(weight_y))
    _extension.cuda().spatial_norm_silu_project(
        _extension.cuda_place(z), _extension.DTYPES[z.dtype], (b * t * h * w, depth, len(weight_y)),
        [tensor.data_ptr() for tensor in (*tensors, latent)],
    )  # fmt: skip
    return latent
