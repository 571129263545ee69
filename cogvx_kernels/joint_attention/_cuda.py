"""`joint_attention` in CUDA C++, on the tensor cores, for tensors of 16 bits."""

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from .. import _extension
from .._extension import DTYPES, cuda_place

FOR_DTYPES = (torch.bfloat16, torch.float16)
FOR_SHAPES = "head widths that are multiples of 8, up to 128"
_PIECE = 8  # numbers that are copied at once


def why_not(q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None) -> str | None:
    if any(x.dtype != q.dtype or x.device != q.device for x in (k, v)):
        return f"every tensor must be {q.dtype} on {q.device}, as q is"
    if q.shape[-1] > 128 or q.shape[-1] % _PIECE:
        return f"the CUDA kernel takes {FOR_SHAPES}, not {q.shape[-1]}"
    return _extension.why_not_cuda(q, FOR_DTYPES)


def forward(
    q: Tensor,  # [B, A, N, E]
    k: Tensor,  # [B, A, N, E]
    v: Tensor,  # [B, A, N, E]
    lengths: list[int] | None,
) -> Tensor:  # [B, N, A E]
    b, a, n, e = q.shape
    y = torch.empty(b, n, a * e, dtype=q.dtype, device=q.device)
    if y.numel():
        q, k, v = map(_with_aligned_rows, (q, k, v))
        tiles = _tiles(q, lengths)
        _extension.cuda().joint_attention_forward_cuda(
            cuda_place(q), DTYPES[q.dtype], (b, a, n, e), _table(tiles, n),
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
    """The gradients; a block sums all of a row, so that they repeat bit for bit."""
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    b, a, n, e = q.shape
    if q.numel():
        grad, q, k, v = map(_with_aligned_rows, (grad, q, k, v))
        tiles = _tiles(q, lengths)
        statistics = torch.empty(b, a, n, 4, dtype=torch.float32, device=q.device)
        _extension.cuda().joint_attention_backward_cuda(
            cuda_place(q), DTYPES[q.dtype], (b, a, n, e), _table(tiles, n),
            _heads(q), _heads(k), _heads(v), _heads(_by_head(grad, a)), *map(_heads, grads), statistics.data_ptr(),
        )  # fmt: skip
    return grads


def _with_aligned_rows(x: Tensor) -> Tensor:
    """`x`, or a copy where a row is strided or does not begin at a multiple of 16 bytes."""
    aligned = x.data_ptr() % 16 == 0 and all(stride % _PIECE == 0 for stride in x.stride()[:-1])
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _by_head(y: Tensor, num_heads: int) -> Tensor:  # [B, N, A E] as [B, A, N, E]
    return y.unflatten(2, (num_heads, -1)).transpose(1, 2)


def _heads(x: Tensor) -> tuple[int, int, int, int]:  # x [B, A, N, E] with contiguous rows
    """Address and strides."""
    return x.data_ptr(), *x.stride()[:3]


def _tiles(q: Tensor, lengths: list[int] | None) -> Tensor | None:  # [tiles, 3]
    if lengths is None:
        return None
    table = _tiles_on_host(tuple(lengths), _extension.cuda().JOINT_ATTENTION_TILE, q.is_cuda)
    return table.to(q.device, non_blocking=True)


def _table(tiles: Tensor | None, num_tokens: int) -> tuple[int, int]:
    """Address and number of tiles; without a table they follow one another."""
    if tiles is None:
        return 0, -(-num_tokens // _extension.cuda().JOINT_ATTENTION_TILE)
    return tiles.data_ptr(), len(tiles)


@lru_cache(maxsize=256)
def _tiles_on_host(lengths: tuple[int, ...], size: int, pinned: bool) -> Tensor:  # [tiles, 3]
    """First row of each tile, first row of its sample and the row after the last; long samples first.

    The table stays on the host, pinned: copying it does not wait for the device, and a captured graph copies it again.
    """
    samples = zip(accumulate(lengths, initial=0), lengths, strict=False)
    rows = [(first, start, start + n) for start, n in samples for first in range(start, start + n, size)]
    table = torch.tensor(sorted(rows, key=lambda row: row[1] - row[2]), dtype=torch.int32)
    return table.pin_memory() if pinned else table
