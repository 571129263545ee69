"""Which tokens of packed samples a program on a GPU owns and which it visits, as a table of tiles."""

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor


def tiles(lengths: list[int] | None, size: int, like: Tensor) -> Tensor | None:  # [tiles, 3] int32
    """First row of each tile of `size`, first row of its sample and the row after the last, on the device of `like`.

    None where nothing is packed: tiles then follow one another.
    """
    if not lengths:
        return None
    table = _on_host(tuple(lengths), size, like.is_cuda)
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        _CAPTURED.append(table)  # every replay reads it, however many others have been made since
    return table.to(like.device, non_blocking=True)


_CAPTURED: list[Tensor] = []


@lru_cache(maxsize=256)
def _on_host(lengths: tuple[int, ...], size: int, pinned: bool) -> Tensor:  # [tiles, 3]
    """The table, long samples first.

    It stays on the host, pinned: copying it does not wait for the device, and a captured graph copies it again.
    """
    samples = zip(accumulate(lengths, initial=0), lengths, strict=False)
    rows = [(first, start, start + n) for start, n in samples for first in range(start, start + n, size)]
    table = torch.tensor(sorted(rows, key=lambda row: row[1] - row[2]), dtype=torch.int32)
    return table.pin_memory() if pinned else table
