"""Causal 3D convolution with mean and variance of its result: the meaning of `causal_conv3d_moments`."""

import torch
from torch import Tensor

from ..causal_conv3d import reference


def forward(
    x: Tensor,  # [B, C, K_t - 1 + T, H, W]: the halo, then the chunk
    weight: Tensor,  # [C_out, C, K_t, K_h, K_w], odd K_h and K_w
    bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, T, H, W]
) -> tuple[Tensor, Tensor]:  # [B, C_out, T, H, W] and [B, 2, C_out]
    # Rounded once: moments show the mean of what rounding does.
    wide = (None if t is None else t.to(_wide(x)) for t in (x, weight, bias, residual))
    y = reference.forward(*wide).to(x.dtype)
    return y, moments(y)


def moments(y: Tensor) -> Tensor:  # [B, C, T, H, W] -> [B, 2, C]
    """Mean and variance of each channel of a chunk, in float32 or float64."""
    y = y.to(_wide(y)).flatten(2)
    mean = y.mean(2)
    return torch.stack([mean, (y - mean[..., None]).square().mean(2)], dim=1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
