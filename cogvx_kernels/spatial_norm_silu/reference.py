"""Spatially conditioned GroupNorm and SiLU behind a halo, in plain PyTorch: the meaning of `spatial_norm_silu`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..group_norm_silu.reference import group_norm, join_halo


def forward(
    x: Tensor,  # [B, C, T, H, W]
    z: Tensor,  # [B, C_z, T_z, H_z, W_z]
    weight: Tensor,  # [C], of the GroupNorm
    bias: Tensor,  # [C]
    weight_y: Tensor,  # [C, C_z], of the 1x1x1 convolution that scales
    bias_y: Tensor,  # [C]
    weight_b: Tensor,  # [C, C_z], of the 1x1x1 convolution that shifts
    bias_b: Tensor,  # [C]
    halo: Tensor | None,  # [B, C, num_halo, H, W]
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None,  # [B, 2, C]
) -> Tensor:  # [B, C, num_halo + T, H, W]
    # A 1x1x1 convolution commutes with a nearest resize, so it runs at the latent's size.
    scale = resize_nearest(_pointwise(z, weight_y, bias_y), x.shape[2:])
    shift = resize_nearest(_pointwise(z, weight_b, bias_b), x.shape[2:])
    y = F.silu(group_norm(x, weight, bias, num_groups, eps) * scale + shift)
    return join_halo(y, halo, num_halo)


def _pointwise(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv3d(z, weight[:, :, None, None, None], bias)


def resize_nearest(z: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Nearest resize of [B, C, T, H, W] to `size`; in an odd number of frames above one, the first stands alone."""
    t, h, w = size
    if t > 1 and t % 2 == 1:
        first = F.interpolate(z[:, :, :1], size=(1, h, w))
        rest = F.interpolate(z[:, :, 1:], size=(t - 1, h, w))
        return torch.cat([first, rest], dim=2)
    return F.interpolate(z, size=(t, h, w))
