"""How `qk_norm_rope`'s tensors are handed to the compiled extension, on CPUs and on GPUs."""

import torch
from torch import Tensor


def widened(angles: Tensor | None, like: Tensor) -> Tensor | None:
    """cos or sin in the dtype that the kernel computes in for tensors like this."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return angles if angles is None else angles.to(wide).contiguous()


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if x is None else x.data_ptr() for x in tensors)


def heads(x: Tensor) -> tuple[int, int, int, int]:  # x [B, A, N, E] with contiguous rows
    return x.data_ptr(), *x.stride()[:3]
