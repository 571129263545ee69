"""A LayerNorm that text and vision modulate differently, in plain PyTorch: the meaning of `expert_layernorm`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor,  # [B, N, D], text first
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    shift: Tensor,  # [B, 2, D], of text, then of vision
    scale: Tensor,  # [B, 2, D]
    num_text: int,
    eps: float,
) -> Tensor:  # [B, N, D]
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    text = torch.addcmul(shift[:, :1], y[:, :num_text], 1 + scale[:, :1])
    vision = torch.addcmul(shift[:, 1:], y[:, num_text:], 1 + scale[:, 1:])
    return torch.cat([text, vision], dim=1)
