"""`qk_norm_rope` in C++ for CPUs; the fused projection is read once, q, k and v are written once."""

import torch
from torch import Tensor

from .. import _extension
from .._extension import DTYPES, rows, with_contiguous_rows


def why_not(
    qkv: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_text: int,
    num_heads: int,
    eps: float,
) -> str | None:
    if qkv.is_cuda:
        return "it has no CUDA kernel yet; Triton serves GPUs"
    return _extension.why_not(qkv)


def forward(
    qkv: Tensor,  # [B, N, 3 A E], text first
    q_weight: Tensor,  # [E]
    q_bias: Tensor,  # [E]
    k_weight: Tensor,  # [E]
    k_bias: Tensor,  # [E]
    cos: Tensor | None,  # [N - num_text, E]
    sin: Tensor | None,  # [N - num_text, E]
    num_text: int,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, A, N, E] each
    b, n, width = qkv.shape
    e = width // (3 * num_heads)
    parts = tuple(torch.empty(b, num_heads, n, e, dtype=qkv.dtype, device=qkv.device) for _ in range(3))
    if qkv.numel():
        qkv, *norms = map(with_contiguous_rows, (qkv, q_weight, q_bias, k_weight, k_bias))
        cos, sin = _widened(cos, qkv), _widened(sin, qkv)
        _extension._C.qk_norm_rope_forward(
            torch.get_num_threads(), DTYPES[qkv.dtype], (b, n, num_text, num_heads, e), eps,
            rows(qkv), _addresses(*norms), _addresses(cos, sin), tuple(map(_heads, parts)),
        )  # fmt: skip
    return parts


def _widened(angles: Tensor | None, like: Tensor) -> Tensor | None:
    """cos or sin in the dtype that the kernel computes in."""
    return angles if angles is None else angles.to(_arithmetic(like)).contiguous()


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if x is None else x.data_ptr() for x in tensors)


def _heads(x: Tensor) -> tuple[int, int, int, int]:  # x [B, A, N, E] with contiguous rows
    return x.data_ptr(), *x.stride()[:3]
