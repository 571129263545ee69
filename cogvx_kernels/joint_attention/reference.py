"""Full attention, within each sample, in plain PyTorch: the meaning of `joint_attention`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    q: Tensor,  # [B, A, N, E]
    k: Tensor,  # [B, A, N, E]
    v: Tensor,  # [B, A, N, E]
    lengths: list[int] | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:  # [B, N, A E] and [B, A, N], or [B, A, 0]
    if lengths:
        samples = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        parts = zip(*(_attend(*sample, return_lse) for sample in samples), strict=True)
        y, lse = (torch.cat(part, dim=2) for part in parts)
    else:
        y, lse = _attend(q, k, v, return_lse)
    return y.transpose(1, 2).flatten(2), lse


def _attend(q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    y, dtype = F.scaled_dot_product_attention(q, k, v), lse_dtype(q)
    if not return_lse:
        return y, q[:, :, :0].sum(-1, dtype=dtype)
    return y, (q.to(dtype) @ k.to(dtype).mT * q.shape[-1] ** -0.5).logsumexp(-1)


def lse_dtype(q: Tensor) -> torch.dtype:
    """Of the logarithms of sums: the difference of two of them weighs one result against another."""
    return torch.promote_types(q.dtype, torch.float32)
