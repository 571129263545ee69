"""`joint_attention` in C++ for CPUs: an online softmax over tiles of keys that stay in the caches.

The gradient runs the forward pass again for the sums of its rows; no matrix of scores is ever written out.
"""

import torch
from torch import Tensor

from .. import _extension
from .._extension import place, with_contiguous_rows
from . import compiled

_NARROW = 8  # channels; in narrower heads all of a gradient can cancel, and few errors average out: they take double


def why_not(q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None, return_lse: bool) -> str | None:
    if any(x.dtype != q.dtype or x.device != q.device for x in (k, v)):
        return f"every tensor must be {q.dtype} on {q.device}, as q is"
    return _extension.why_not(q)


def forward(
    q: Tensor,  # [B, A, N, E]
    k: Tensor,  # [B, A, N, E]
    v: Tensor,  # [B, A, N, E]
    lengths: list[int] | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:  # [B, N, A E] and [B, A, N], or [B, A, 0]
    if q.shape[3] < _NARROW and q.dtype != torch.float64:
        y, lse = forward(q.double(), k.double(), v.double(), lengths, return_lse)
        return y.to(q.dtype), lse.float()
    q, k, v = map(with_contiguous_rows, (q, k, v))
    return compiled.forward(_extension._C, place(q), _samples(q, lengths), q, k, v, return_lse)


def scratch(q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None, return_lse: bool) -> list[Tensor]:
    """Of narrow heads all of it in double."""
    narrow = q.shape[3] < _NARROW and q.dtype != torch.float64
    return [x.new_empty(x.shape, dtype=torch.float64) for x in (q, k, v, q)] if narrow else []


def backward(
    grad: Tensor,  # [B, N, A E]
    grad_lse: Tensor,  # [B, A, N], or [B, A, 0]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int] | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # of q, k, v
    """The gradients, the same whatever the number of threads: one thread sums a head of a sample, in one order."""
    if q.shape[3] < _NARROW and q.dtype != torch.float64:
        wide = (x.double() for x in (grad, grad_lse, q, k, v))
        return tuple(g.to(q.dtype) for g in backward(*wide, lengths, return_lse))
    grad, q, k, v = map(with_contiguous_rows, (grad, q, k, v))
    return compiled.backward(_extension._C, place(q), _samples(q, lengths), grad, grad_lse, q, k, v)


def _samples(q: Tensor, lengths: list[int] | None) -> compiled.Tokens:
    return lengths or [q.shape[2]], 0, 0
