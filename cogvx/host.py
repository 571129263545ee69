"""Tensors that wait in the host's memory while the device works on others.

A move is a copy, on a CPU too, so that a run there holds what a run on a GPU holds, in one memory in place of two.
What is made inside of `host_memory()` belongs to the host; who counts bytes asks `in_host_memory()`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_depth = 0


@contextmanager
def host_memory() -> Iterator[None]:
    """Tensors made here lie on the host."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def in_host_memory() -> bool:
    return _depth > 0


def to_host(x: Tensor) -> Tensor:
    """A copy on the host, in the same memory format."""
    with host_memory():
        return x.to("cpu", copy=True)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, in the same memory format; for the slice of a tensor, of that slice alone."""
    return x.to(device, copy=True)


def empty_on_host(shape: Sequence[int], like: Tensor) -> Tensor:
    """A video [B, C, T, H, W] to be filled, channels last, in the dtype of `like`."""
    with host_memory():
        return torch.empty(tuple(shape), dtype=like.dtype, memory_format=torch.channels_last_3d)
