"""Full attention, within each sample, in plain PyTorch: the meaning of `joint_attention`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    q: Tensor,  # [B, A, N, E]
    k: Tensor,  # [B, A, N, E]
    v: Tensor,  # [B, A, N, E]
    lengths: list[int] | None,
) -> Tensor:  # [B, N, A E]
    if lengths:
        samples = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        y = torch.cat([F.scaled_dot_product_attention(*sample) for sample in samples], dim=2)
    else:
        y = F.scaled_dot_product_attention(q, k, v)
    return y.transpose(1, 2).flatten(2)
