"""How `joint_attention` calls the compiled extension, on CPUs and on GPUs."""

from types import ModuleType

import torch
from torch import Tensor

from .._extension import DTYPES, by_head, heads
from .reference import lse_dtype

# Who sees whom: on CPUs the lengths of the samples; on GPUs the address of a table of tiles, or 0, and their number.
Tokens = tuple[list[int], int, int]


def forward(
    module: ModuleType,
    where: tuple,
    tokens: Tokens,
    q: Tensor,  # [B, A, N, E]
    k: Tensor,  # [B, A, N, E]
    v: Tensor,  # [B, A, N, E]
    return_lse: bool,
) -> tuple[Tensor, Tensor]:  # [B, N, A E] and [B, A, N], or [B, A, 0]
    b, a, n, e = q.shape
    y = torch.empty(b, n, a * e, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, a, n if return_lse else 0, dtype=lse_dtype(q), device=q.device)
    if y.numel():
        module.joint_attention_forward(
            where, DTYPES[q.dtype], (b, a, n, e), tokens, heads(q), heads(k), heads(v), heads(by_head(y, a)),
            lse.data_ptr(),
        )  # fmt: skip
    return y, lse


def backward(
    module: ModuleType,
    where: tuple,
    tokens: Tokens,
    grad: Tensor,  # [B, N, A E]
    grad_lse: Tensor,  # [B, A, N], or [B, A, 0]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Tensor | None = None,  # [B, A, N, 4] for GPUs to write to
) -> tuple[Tensor, Tensor, Tensor]:  # of q, k, v
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    b, a, n, e = q.shape
    grad_lse = grad_lse.contiguous()
    if q.numel():
        module.joint_attention_backward(
            where, DTYPES[q.dtype], (b, a, n, e), tokens, heads(q), heads(k), heads(v), heads(by_head(grad, a)),
            *map(heads, grads), grad_lse.data_ptr(), 0 if statistics is None else statistics.data_ptr(),
        )  # fmt: skip
    return grads
