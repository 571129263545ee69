"""The buffer [halo, y] that the norms write and the next convolution reads, and its gradient."""

import torch
from torch import Tensor

from ._op import _memory_format


def dense(x: Tensor, like: Tensor) -> Tensor:  # [B, C, T, H, W]
    """`x`, or a copy of it where it is not dense in the memory format in which results like `like` are."""
    return x.contiguous(memory_format=_memory_format(like))


def behind_halo(
    x: Tensor,  # [B, C, T, H, W]
    halo: Tensor | None,  # [B, C, num_halo, H, W]
    num_halo: int,
    memory_format: torch.memory_format | None = None,
) -> Tensor:  # [B, C, num_halo + T, H, W]
    """A new buffer, in the memory format of x if not in another; a given halo is written into its first frames."""
    b, c, t, h, w = x.shape
    memory_format = memory_format or _memory_format(x)
    y = torch.empty((b, c, num_halo + t, h, w), dtype=x.dtype, device=x.device, memory_format=memory_format)
    if halo is not None and num_halo:
        y[:, :, :num_halo].copy_(halo)
    return y


def gradient_of_halo(grad: Tensor, halo: Tensor | None) -> Tensor | None:  # grad [B, C, num_halo + T, H, W]
    """A copy of the halo's frames in the gradient of the buffer."""
    if halo is None:
        return None
    new = torch.empty(halo.shape, dtype=halo.dtype, device=halo.device, memory_format=_memory_format(halo))
    return new.copy_(grad[:, :, : halo.shape[2]])


def sums_dtype(x: Tensor) -> torch.dtype:
    """The arithmetic of gradients: in a small chunk few errors average out, and double costs nothing."""
    small = x.dtype == torch.float32 and x.numel() <= 2**15
    return torch.float64 if small or x.dtype == torch.float64 else torch.float32
