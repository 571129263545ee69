"""`joint_attention` in C++ for CPUs: an online softmax over tiles of keys that stay in the caches.

The gradient runs the forward pass again for the sums of its rows; no matrix of scores is ever written out.
"""

import torch
from torch import Tensor

from .. import _extension
from .._extension import DTYPES, with_contiguous_rows


def why_not(q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None) -> str | None:
    if any(x.dtype != q.dtype or x.device != q.device for x in (k, v)):
        return f"every tensor must be {q.dtype} on {q.device}, as q is"
    return _extension.why_not(q)


def forward(
    q: Tensor,  # [B, A, N, E]
    k: Tensor,  # [B, A, N, E]
    v: Tensor,  # [B, A, N, E]
    lengths: list[int] | None,
) -> Tensor:  # [B, N, A E]
    b, a, n, e = q.shape
    y = torch.empty(b, n, a * e, dtype=q.dtype, device=q.device)
    if y.numel():
        q, k, v = map(with_contiguous_rows, (q, k, v))
        _extension._C.joint_attention_forward(
            torch.get_num_threads(), DTYPES[q.dtype], (b, a, n, e), lengths or [n],
            _heads(q), _heads(k), _heads(v), _heads(_by_head(y, a)),
        )  # fmt: skip
    return y


def backward(
    grad: Tensor,  # [B, N, A E]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:  # of q, k, v
    """The gradients, the same whatever the number of threads: one thread sums a head of a sample, in one order."""
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    b, a, n, e = q.shape
    if q.numel():
        grad, q, k, v = map(with_contiguous_rows, (grad, q, k, v))
        _extension._C.joint_attention_backward(
            torch.get_num_threads(), DTYPES[q.dtype], (b, a, n, e), lengths or [n],
            _heads(q), _heads(k), _heads(v), _heads(_by_head(grad, a)), *map(_heads, grads),
        )  # fmt: skip
    return grads


def _by_head(y: Tensor, num_heads: int) -> Tensor:  # [B, N, A E] as [B, A, N, E]
    return y.unflatten(2, (num_heads, -1)).transpose(1, 2)


def _heads(x: Tensor) -> tuple[int, int, int, int]:  # x [B, A, N, E] with contiguous rows
    """Address and strides."""
    return x.data_ptr(), *x.stride()[:3]
