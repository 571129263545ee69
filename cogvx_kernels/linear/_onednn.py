"""`linear` through oneDNN: PyTorch takes it for bf16 products alone, and MKL for fp32 ones, at half its speed on AMD.

GELU is applied to the sums as they leave the product.
The operator that reaches it is PyTorch's own, made for its compiler; where a version lacks it, this backend says so.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> str | None:
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return f"oneDNN takes products of up to float32 on CPUs, not of {x.dtype} on {x.device}"
    if any(other is not None and (other.dtype, other.device) != (x.dtype, x.device) for other in (weight, bias)):
        return f"every tensor must be {x.dtype} on {x.device}, as x is"
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "this PyTorch was built without oneDNN, or it is turned off"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return f"PyTorch {torch.__version__} has no mkldnn._linear_pointwise"
    if x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 products"
    return None


def forward(
    x: Tensor,  # [B, N, D]
    weight: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    gelu: bool,
) -> Tensor:  # [B, N, K]
    return _product(x.flatten(0, 1), weight, bias, gelu).unflatten(0, x.shape[:2])


def backward(
    grad: Tensor,  # [B, N, K]
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gelu: bool,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # of x, weight, bias; None where it is not needed
    rows, grads = x.flatten(0, 1), grad.flatten(0, 1)
    if gelu:
        grads = torch.ops.aten.gelu_backward(grads, _product(rows, weight, bias), approximate="tanh")
    return (
        _product(grads, weight.t(), None).unflatten(0, x.shape[:2]) if needs[0] else None,
        _product(grads.t(), rows.t(), None) if needs[1] else None,
        grads.sum(0) if needs[2] and bias is not None else None,
    )


def _product(
    a: Tensor,  # [M, D]
    b: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    gelu: bool = False,
) -> Tensor:  # [M, K]
    if not (a.numel() and b.numel()):
        return reference.forward(a, b, bias, gelu)
    if a.dtype == torch.float16:  # few CPUs multiply these
        return _product(a.float(), b.float(), None if bias is None else bias.float(), gelu).half()
    # oneDNN adds the terms of a float32 sum one after the other; in parts it loses no more than PyTorch's product does.
    parts = max(1, min(4, a.shape[1] // 480)) if a.dtype == torch.float32 else 1
    if parts == 1:
        return _multiply(a, b, bias, *(("gelu", "tanh") if gelu else ()))
    pairs = zip(a.tensor_split(parts, dim=1), b.tensor_split(parts, dim=1), strict=True)
    y = _multiply(*next(pairs), bias)
    for pair in pairs:
        y += _multiply(*pair, None)
    return torch.ops.aten.gelu_(y, approximate="tanh") if gelu else y


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None, activation: str = "none", kind: str = "") -> Tensor:
    # oneDNN reads a bias as if it were dense, and takes a path a hundred times as slow for gaps between rows.
    a, b = (x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous() for x in (a, b))
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, activation, [], kind)
