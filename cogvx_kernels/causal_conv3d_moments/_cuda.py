"""`causal_conv3d_moments` in CUDA C++: the convolution's tiles are measured before they leave the chip."""

import torch
from torch import Tensor

from .. import _extension
from .._convolution import FOR_DTYPES, FOR_SHAPES, convolve_causally, scratch_causally
from .._convolution import why_not_causally as why_not

__all__ = ["FOR_DTYPES", "FOR_SHAPES", "forward", "why_not"]

_GROUPS = 64  # that tiles are put together to at first: enough blocks for any GPU, the same on all


def forward(
    x: Tensor,  # [B, C, K_t - 1 + T, H, W]: the halo, then the chunk
    weight: Tensor,  # [C_out, C, K_t, K_h, K_w], odd K_h and K_w
    bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, T, H, W]
) -> tuple[Tensor, Tensor]:  # [B, C_out, T, H, W] and [B, 2, C_out]
    module, b, width = _extension.cuda(), len(x), len(weight)
    tiles = _of_tiles(x, weight)
    num_tiles = tiles.shape[1]
    y = convolve_causally(module.causal_conv3d_moments_forward, x, weight, bias, residual, moments=tiles)
    moments = torch.empty(b, 2, width, dtype=torch.float32, device=x.device)
    if b:
        a_group = -(-num_tiles // _GROUPS)
        num_groups = -(-num_tiles // a_group)
        groups = moments if num_groups == 1 else tiles.new_empty(b, num_groups, 3, width)
        _merge(tiles, groups, a_group)
        if num_groups > 1:
            _merge(groups, moments, num_groups)
    return y, moments


def scratch(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> list[Tensor]:
    return [_of_tiles(x, weight), *scratch_causally(x, weight, bias, residual)]


def _of_tiles(x: Tensor, weight: Tensor) -> Tensor:  # [B, tiles, 3, C_out]
    """Memory for the moments of every tile."""
    num_tiles = _extension.cuda().causal_conv3d_moments_tiles(x.shape[2] - weight.shape[2] + 1, *x.shape[3:])
    return x.new_empty(len(x), num_tiles, 3, len(weight), dtype=torch.float32)


def _merge(parts: Tensor, to: Tensor, a_group: int) -> None:  # [B, parts, 3, C_out]
    sizes = len(parts), parts.shape[3], parts.shape[1], a_group
    _extension.cuda().causal_conv3d_moments_merge(_extension.cuda_place(parts), sizes, parts.data_ptr(), to.data_ptr())
