"""Attention with int8 queries and keys, simulated in plain PyTorch: the meaning of `int8_joint_attention`."""

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES, KEYS = 128, 64  # tokens that share a scale
SMALLEST_PEAK = 1e-30  # of a group: its scale has an inverse even where every value is zero


def forward(
    q: Tensor,  # [B, A, N, E]
    k: Tensor,  # [B, A, N, E]
    v: Tensor,  # [B, A, N, E]
) -> Tensor:  # [B, N, A E]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q = _rounded(q.float(), QUERIES, wide)
    k = _rounded(k.float() - mean_of_tokens(k), KEYS, wide)
    y = F.scaled_dot_product_attention(q, k, v.to(wide)).to(v.dtype)
    return y.transpose(1, 2).flatten(2)


def mean_of_tokens(k: Tensor) -> Tensor:  # [B, A, N, E] -> [B, A, 1, E]
    """The mean that is taken from every key; in a wide sum no order of its terms decides what a key rounds to."""
    return k.mean(dim=2, keepdim=True, dtype=torch.float64).float()


def quantize(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """x in float32 as whole numbers from -127 to 127, and the scale of each group of `size` tokens."""
    tokens = x.shape[2]
    num_groups = -(-tokens // size)
    groups = F.pad(x, (0, 0, 0, num_groups * size - tokens)).unflatten(2, (num_groups, size))
    scales = groups.abs().amax((3, 4), keepdim=True).clamp(min=SMALLEST_PEAK) * (1 / 127)
    return torch.round(groups * scales.reciprocal()).flatten(2, 3)[:, :, :tokens], scales[:, :, :, 0, 0]


def _rounded(x: Tensor, size: int, wide: torch.dtype) -> Tensor:
    """What int8 keeps of x."""
    integers, scales = quantize(x, size)
    return integers.to(wide) * scales.to(wide).repeat_interleave(size, dim=2)[:, :, : x.shape[2], None]
