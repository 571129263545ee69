"""A fully connected layer in plain PyTorch: the meaning of `linear`."""

import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor,  # [B, N, D]
    weight: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    gelu: bool,
) -> Tensor:  # [B, N, K]
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y
