"""`joint_attention` in CUDA C++, on the tensor cores, for tensors of 16 bits."""

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from .. import _extension
from .._extension import cuda_place, with_aligned_rows
from . import compiled

FOR_DTYPES = (torch.bfloat16, torch.float16)
FOR_SHAPES = "head widths that are multiples of 8, up to 128"


def why_not(q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None) -> str | None:
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
) -> Tensor:  # [B, N, A E]
    q, k, v = map(with_aligned_rows, (q, k, v))
    tiles = _tiles(q, lengths)
    return compiled.forward(_extension.cuda(), cuda_place(q), _table(tiles, q), q, k, v)


def backward(
    grad: Tensor,  # [B, N, A E]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:  # of q, k, v
    """The gradients; a block sums all of a row, so that they repeat bit for bit."""
    grad, q, k, v = map(with_aligned_rows, (grad, q, k, v))
    tiles = _tiles(q, lengths)
    statistics = torch.empty(*q.shape[:3], 4, dtype=torch.float32, device=q.device)
    return compiled.backward(_extension.cuda(), cuda_place(q), _table(tiles, q), grad, q, k, v, statistics)


def _tiles(q: Tensor, lengths: list[int] | None) -> Tensor | None:  # [tiles, 3]
    if not lengths:
        return None
    table = _tiles_on_host(tuple(lengths), _extension.cuda().JOINT_ATTENTION_TILE, q.is_cuda)
    return table.to(q.device, non_blocking=True)


def _table(tiles: Tensor | None, q: Tensor) -> compiled.Tokens:
    """The table, which must outlive the call; without one tiles follow one another."""
    if tiles is None:
        return [], 0, -(-q.shape[2] // _extension.cuda().JOINT_ATTENTION_TILE)
    return [], tiles.data_ptr(), len(tiles)


@lru_cache(maxsize=256)
def _tiles_on_host(lengths: tuple[int, ...], size: int, pinned: bool) -> Tensor:  # [tiles, 3]
    """First row of each tile, first row of its sample and the row after the last; long samples first.

    The table stays on the host, pinned: copying it does not wait for the device, and a captured graph copies it again.
    """
    samples = zip(accumulate(lengths, initial=0), lengths, strict=False)
    rows = [(first, start, start + n) for start, n in samples for first in range(start, start + n, size)]
    table = torch.tensor(sorted(rows, key=lambda row: row[1] - row[2]), dtype=torch.int32)
    return table.pin_memory() if pinned else table
