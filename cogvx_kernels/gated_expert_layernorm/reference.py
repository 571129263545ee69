"""A gated sum and the modulated LayerNorm of it, in plain PyTorch: the meaning of `gated_expert_layernorm`."""

import torch
from torch import Tensor

from ..expert_layernorm import reference as expert_layernorm


def forward(
    x: Tensor,  # [B, N, D], text first
    y: Tensor,  # [B, N, D]
    gate: Tensor,  # [B, 2, D], of text, then of vision
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    shift: Tensor,  # [B, 2, D]
    scale: Tensor,  # [B, 2, D]
    num_text: int,
    eps: float,
) -> tuple[Tensor, Tensor]:  # [B, N, D] each
    text = torch.addcmul(x[:, :num_text], gate[:, :1], y[:, :num_text])
    vision = torch.addcmul(x[:, num_text:], gate[:, 1:], y[:, num_text:])
    x = torch.cat([text, vision], dim=1)
    return x, expert_layernorm.forward(x, weight, bias, shift, scale, num_text, eps)
