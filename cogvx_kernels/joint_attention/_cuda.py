"""`joint_attention` in CUDA C++, on the tensor cores, for tensors of 16 bits."""

import torch
from torch import Tensor

from .. import _extension
from .._extension import cuda_place, with_aligned_rows
from . import compiled
from .tiles import tiles

FOR_DTYPES = (torch.bfloat16, torch.float16)
FOR_SHAPES = "head widths that are multiples of 8, up to 128"


def why_not(q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None, return_lse: bool) -> str | None:
    if any(x.dtype != q.dtype or x.device != q.device for x in (k, v)):
        return f"every tensor must be {q.dtype} on {q.device}, as q is"
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"the CUDA kernel takes {FOR_SHAPES}, not {q.shape[-1]}"
    return _extension.why_not_cuda(q, FOR_DTYPES)


def forward(
    q: Tensor,  # [B, A, N, E]
    k: Tensor,  # [B, A, N, E]
    v: Tensor,  # [B, A, N, E]
    lengths: list[int] | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:  # [B, N, A E] and [B, A, N], or [B, A, 0]
    q, k, v = map(with_aligned_rows, (q, k, v))
    table = _tiles(q, lengths)
    return compiled.forward(_extension.cuda(), cuda_place(q), _tokens(table, q), q, k, v, return_lse)


def backward(
    grad: Tensor,  # [B, N, A E]
    grad_lse: Tensor,  # [B, A, N], or [B, A, 0]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int] | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # of q, k, v
    """The gradients; a block sums all of a row, so that they repeat bit for bit."""
    grad, q, k, v = map(with_aligned_rows, (grad, q, k, v))
    table = _tiles(q, lengths)
    statistics = torch.empty(*q.shape[:3], 4, dtype=torch.float32, device=q.device)
    return compiled.backward(_extension.cuda(), cuda_place(q), _tokens(table, q), grad, grad_lse, q, k, v, statistics)


def _tiles(q: Tensor, lengths: list[int] | None) -> Tensor | None:  # [tiles, 3]
    return tiles(lengths, _extension.cuda().JOINT_ATTENTION_TILE, q)


def _tokens(table: Tensor | None, q: Tensor) -> compiled.Tokens:
    """The table, which must outlive the call; without one tiles follow one another."""
    if table is None:
        return [], 0, -(-q.shape[2] // _extension.cuda().JOINT_ATTENTION_TILE)
    return [], table.data_ptr(), len(table)
