"""A 3x3 convolution of frames with step 2, in plain PyTorch: the meaning of `downsample_conv`."""

import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor,  # [B, C, T, H, W], H and W at least 2
    weight: Tensor,  # [C_out, C, 3, 3]
    bias: Tensor,  # [C_out]
) -> Tensor:  # [B, C_out, T, H / 2, W / 2], rounded down
    b, _, t, _, _ = x.shape
    frames = F.pad(x.transpose(1, 2).flatten(0, 1), (0, 1, 0, 1))
    return F.conv2d(frames, weight, bias, stride=2).unflatten(0, (b, t)).transpose(1, 2)
