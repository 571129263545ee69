"""Where Triton kernels run."""

import functools

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # as kernels are that are defined now; to ask again costs microseconds


def why_not_there(x: Tensor) -> str | None:
    """Why Triton cannot work on tensors like `x`, or None."""
    if INTERPRETED:
        return None
    if not x.is_cuda:
        return "Triton runs on CUDA tensors, or anywhere with TRITON_INTERPRET=1"
    return _why_not_device(x.device.index)


@functools.cache
def _why_not_device(device: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8 or torch.version.hip:
        return None
    return f"cuda:{device} has compute capability {major}.{minor}; Triton's kernels are for 8.0 and later"
