"""The compiled extension `_C`, seen from Python: whether it runs for a tensor, and how tensors are handed to it.

It knows nothing of torch: it takes addresses, sizes, strides in elements and a stream, all as numbers.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

try:
    from . import _C

    _missing = None
except ImportError as error:
    _C = None
    _missing = f"the compiled extension cannot be loaded ({error}); `pip install .` builds it"

Place = tuple[bool, int, int, int]  # on CUDA or not, threads of a CPU, a GPU's number and stream
_on_host: ModuleType | None = None

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}


def built_with() -> dict:
    """What the extension was compiled with: compiler, OpenMP, CUDA and its architectures, CPU variants."""
    return {"missing": _missing} if _C is None else {"missing": None, **_C.built_with()}


def why_not(x: Tensor) -> str | None:
    """Why the extension's CPU kernels cannot work on tensors like `x`, or None."""
    if _missing:
        return _missing
    if x.dtype not in DTYPES:
        return f"the compiled kernels work in float32, float16, bfloat16 and float64, not in {x.dtype}"
    return None if x.device.type == "cpu" else f"these kernels run on CPUs, not on {x.device}"


def why_not_cuda(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the extension's CUDA kernels, compiled for these dtypes, cannot work on tensors like `x`, or None."""
    if x.dtype not in dtypes:
        return _why_not_dtype(x.dtype, dtypes)
    if _on_host is not None:
        return None if x.device.type == "cpu" else "the CUDA kernels run on the host at present"
    if _missing:
        return _missing
    if x.device.type == "cuda" and not torch.version.hip:
        return _why_not_device(x.device.index)
    return _why_not_elsewhere(x.device.type)


@functools.cache  # as the others: on a CPU every call of an operator may ask
def _why_not_dtype(dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str:
    return f"the CUDA kernel works in {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, not in {dtype}"


@functools.cache
def _why_not_device(device: int) -> str | None:
    reason = _C.why_not_cuda(device)
    return reason and f"cuda:{device} cannot run the compiled kernels: {reason}"


@functools.cache
def _why_not_elsewhere(kind: str) -> str:
    if _C.built_with()["cuda"] is None:
        return _C.why_not_cuda(0)
    here = "" if torch.cuda.is_available() else ", and torch finds no GPU here"
    return f"CUDA kernels run on CUDA devices, not on {kind}{here}"


def cuda() -> ModuleType:
    """The module whose CUDA kernels run: the extension, or in tests a build of it for the host."""
    return _on_host or _C


@contextmanager
def cuda_on_host(module: ModuleType) -> Iterator[None]:
    """Run CUDA kernels on CPU tensors, by an extension whose .cu files were compiled for the host; for tests."""
    global _on_host
    before, _on_host = _on_host, module
    try:
        yield
    finally:
        _on_host = before


def place(x: Tensor) -> Place:
    """Where a CPU kernel runs: not on CUDA, with so many threads."""
    return False, torch.get_num_threads(), 0, 0


def cuda_place(x: Tensor) -> Place:
    """Where a CUDA kernel runs: on CUDA, on the tensor's device and on its current stream."""
    return True, 0, *((x.device.index, torch.cuda.current_stream(x.device).cuda_stream) if x.is_cuda else (0, 0))


def rows(x: Tensor) -> tuple[int, int, int]:  # x [B, N, D] with contiguous rows
    """Address and strides of a tensor of rows."""
    return x.data_ptr(), x.stride(0), x.stride(1)


def with_contiguous_rows(x: Tensor) -> Tensor:
    """`x`, or a copy of it where its last dimension is strided."""
    return x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()


def heads(x: Tensor) -> tuple[int, int, int, int]:  # x [B, A, N, E] with contiguous rows
    """Address and strides of a tensor of heads."""
    return x.data_ptr(), *x.stride()[:3]


def by_head(y: Tensor, num_heads: int) -> Tensor:  # [B, N, A E] as [B, A, N, E]
    """A view of rows in which heads lie side by side."""
    return y.unflatten(2, (num_heads, -1)).transpose(1, 2)


def with_aligned_rows(x: Tensor) -> Tensor:
    """`x`, or a copy of it where a row is strided or does not begin at a multiple of 16 bytes."""
    piece = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(stride % piece == 0 for stride in x.stride()[:-1])
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
