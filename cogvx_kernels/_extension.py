"""The compiled extension `_C`, seen from Python: whether it runs for a tensor, and how tensors are handed to it.

It knows nothing of torch: it takes addresses, sizes, strides in elements and a stream, all as numbers.
"""

import functools

import torch
from torch import Tensor

try:
    from . import _C

    _missing = None
except ImportError as error:
    _C = None
    _missing = f"the compiled extension cannot be loaded ({error}); `pip install .` builds it"

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}


def built_with() -> dict:
    """What the extension was compiled with: compiler, OpenMP, CUDA and its architectures, CPU variants."""
    return {"missing": _missing} if _C is None else {"missing": None, **_C.built_with()}


def why_not(x: Tensor) -> str | None:
    """Why the extension cannot work on tensors like `x`, or None."""
    if _missing:
        return _missing
    if x.dtype not in DTYPES:
        return f"the compiled kernels work in float32, float16, bfloat16 and float64, not in {x.dtype}"
    if x.device.type == "cpu":
        return None
    if x.device.type != "cuda" or torch.version.hip:
        return f"the compiled kernels run on CPUs and CUDA devices, not on {x.device}"
    return _why_not_cuda(x.device.index)


@functools.cache
def _why_not_cuda(device: int) -> str | None:
    reason = _C.why_not_cuda(device)
    return reason and f"cuda:{device} cannot run the compiled kernels: {reason}"


def place(x: Tensor) -> tuple[bool, int, int, int]:
    """Where the kernel runs: whether on CUDA, threads, device, stream."""
    if x.is_cuda:
        return True, 0, x.device.index, torch.cuda.current_stream(x.device).cuda_stream
    return False, torch.get_num_threads(), 0, 0


def rows(x: Tensor) -> tuple[int, int, int]:  # x [B, N, D] with contiguous rows
    """Address and strides of a tensor of rows."""
    return x.data_ptr(), x.stride(0), x.stride(1)


def with_contiguous_rows(x: Tensor) -> Tensor:
    """`x`, or a copy of it where its last dimension is strided."""
    return x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()
