"""`linear` through oneDNN: PyTorch takes it for bf16 products alone, and MKL for fp32 ones, at half its speed on AMD.

GELU is applied to the sums as they leave the product.
The operator that reaches it is PyTorch's own, made for its compiler; where a version lacks it, this backend says so.
"""

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
) -> tuple[Tensor, Tensor, Tensor | None]:  # of x, weight, bias
    rows, grads = x.flatten(0, 1), grad.flatten(0, 1)
    if gelu:
        grads = torch.ops.aten.gelu_backward(grads, _product(rows, weight, bias), approximate="tanh")
    grad_x = _product(grads, weight.t(), None).unflatten(0, x.shape[:2])
    return grad_x, _product(grads.t(), rows.t(), None), None if bias is None else grads.sum(0)


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
    activation, kind = ("gelu", "tanh") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, activation, [], kind)
