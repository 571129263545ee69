"""`linear` in C++ for CPUs: the same sums on any number of threads, GELU on the way out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _extension
from .._extension import DTYPES
from . import reference

_FEW = 64  # rows for which it does not pay to pack the weight


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> str | None:
    if any(other is not None and (other.dtype, other.device) != (x.dtype, x.device) for other in (weight, bias)):
        return f"every tensor must be {x.dtype} on {x.device}, as x is"
    if x.is_cuda:
        return "linear has no CUDA kernel: PyTorch's own is at the peak"
    if x.dtype == torch.float64:
        return "linear works in float32, float16 and bfloat16"
    return _extension.why_not(x)


def forward(
    x: Tensor,  # [B, N, D]
    weight: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    gelu: bool,
) -> Tensor:  # [B, N, K]
    if x.shape[0] * x.shape[1] < _FEW:
        return reference.forward(x, weight, bias, gelu)
    return _product(x.flatten(0, 1), weight, bias, gelu).unflatten(0, x.shape[:2])


def scratch(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> list[Tensor]:
    """The weight packed, or of few rows what GELU reads."""
    m, k = x.shape[0] * x.shape[1], len(weight)
    if m < _FEW:
        return [x.new_empty(m, k)] if gelu else []
    return [_packed(x.dtype, (m, k, x.shape[2]))] if m * k else []


def backward(
    grad: Tensor,  # [B, N, K]
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gelu: bool,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # of x, weight, bias; None where it is not needed
    rows, grads = x.flatten(0, 1), grad.flatten(0, 1)
    if gelu:  # times its slope, at the sums in fp32, which are computed once more
        grads = _product(rows, weight, bias, gelu, grads.contiguous())
    return (
        _product(grads, weight.t()).unflatten(0, x.shape[:2]) if needs[0] else None,
        _product(grads.t(), rows.t()) if needs[1] else None,
        grads.sum(0) if needs[2] and bias is not None else None,
    )


def _product(
    a: Tensor,  # [M, D]
    b: Tensor,  # [K, D]
    bias: Tensor | None = None,  # [K]
    gelu: bool = False,
    grad: Tensor | None = None,  # [M, K], dense: the result is its product with the slope of GELU
) -> Tensor:  # [M, K]
    y = torch.empty(len(a), len(b), dtype=a.dtype)
    if y.numel():
        dtype, sizes = DTYPES[a.dtype], (len(a), len(b), a.shape[1])
        packed = _packed(a.dtype, sizes)
        bias = None if bias is None else bias.contiguous()
        _extension._C.linear_multiply(
            torch.get_num_threads(), dtype, sizes, (a.data_ptr(), *a.stride()), (b.data_ptr(), *b.stride()),
            0 if bias is None else bias.data_ptr(), gelu, 0 if grad is None else grad.data_ptr(), y.data_ptr(),
            packed.data_ptr(),
        )  # fmt: skip
    return y


def _packed(dtype: torch.dtype, sizes: tuple[int, int, int]) -> Tensor:  # M, K, D
    """Memory for b in the order in which it is multiplied."""
    return torch.empty(_extension._C.linear_packed_bytes(DTYPES[dtype], sizes), dtype=torch.uint8)
