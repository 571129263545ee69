"""A fully connected layer in plain PyTorch: the meaning of `linear`."""

import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor,  # [B, N, D]
    weight: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
) -> Tensor:  # [B, N, K]
    return F.linear(x, weight, bias)
