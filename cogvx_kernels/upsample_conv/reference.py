"""Nearest upsampling and the 3x3 convolution after it, in plain PyTorch: the meaning of `upsample_conv`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [C_out, C, 3, 3]
    bias: Tensor,  # [C_out]
    double_time: bool,
) -> Tensor:  # [B, C_out, T', 2H, 2W]; T' = T, or with double_time 2T - 1 (odd T) or 2T (even T)
    b, _, t, _, _ = x.shape
    frames = x.transpose(1, 2).flatten(0, 1)
    # The convolution acts on frames alone, so it runs once for each pair of equal frames.
    frames = F.conv2d(F.interpolate(frames, scale_factor=2.0), weight, bias, padding=1)
    y = frames.unflatten(0, (b, t)).transpose(1, 2)
    return repeat_frames(y) if double_time else y


def repeat_frames(y: Tensor) -> Tensor:
    """Every frame twice; in an odd number of frames the first stands alone."""
    if y.shape[2] % 2 == 1:
        return torch.cat([y[:, :, :1], y[:, :, 1:].repeat_interleave(2, dim=2)], dim=2)
    return y.repeat_interleave(2, dim=2)
