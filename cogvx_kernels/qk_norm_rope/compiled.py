"""`qk_norm_rope` by the compiled extension, on CPUs and on GPUs: what is allocated, and what is handed over."""

from types import ModuleType

import torch
from torch import Tensor

from .._extension import DTYPES, Place, rows, with_contiguous_rows


def forward(
    module: ModuleType,
    place: Place,
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
    *,
    narrow_angles: bool,  # whether the kernel that rounds reads cos and sin as they are
) -> tuple[Tensor, Tensor, Tensor]:  # [B, A, N, E] each
    b, n, _ = qkv.shape
    e = q_weight.shape[0]
    parts = tuple(torch.empty(b, num_heads, n, e, dtype=qkv.dtype, device=qkv.device) for _ in range(3))
    if qkv.numel():
        qkv, *norms = map(with_contiguous_rows, (qkv, q_weight, q_bias, k_weight, k_bias))
        rounded = cos is not None and is_narrow(cos, sin, qkv)
        turns = angles(qkv, cos, sin, narrow_angles)
        module.qk_norm_rope_forward(
            place, DTYPES[qkv.dtype], (b, n, num_text, num_heads, e), eps,
            rows(qkv), addresses(*norms), addresses(*turns), rounded, tuple(map(heads, parts)),
        )  # fmt: skip
    return parts


def angles(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, narrow_angles: bool
) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin as the kernel reads them."""
    if cos is not None and narrow_angles and is_narrow(cos, sin, qkv):
        return cos.contiguous(), sin.contiguous()
    return widened(cos, qkv), widened(sin, qkv)


def is_narrow(cos: Tensor, sin: Tensor, like: Tensor) -> bool:
    """Whether cos and sin are of 16 bits, as `like`: then what they turn is rounded to those."""
    return cos.dtype == sin.dtype == like.dtype and like.dtype.itemsize == 2


def widened(angles: Tensor | None, like: Tensor) -> Tensor | None:
    """cos or sin in the dtype that the kernel computes in for tensors like this."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return angles if angles is None else angles.to(wide).contiguous()


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if x is None else x.data_ptr() for x in tensors)


def heads(x: Tensor) -> tuple[int, int, int, int]:  # x [B, A, N, E] with contiguous rows
    return x.data_ptr(), *x.stride()[:3]
