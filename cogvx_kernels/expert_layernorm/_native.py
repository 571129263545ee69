"""`expert_layernorm` in C++ for CPUs; a row is read once and written once."""

import torch
from torch import Tensor

from .. import _extension
from .._extension import DTYPES, place, rows, with_contiguous_rows


def why_not(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, num_text: int, eps: float
) -> str | None:
    others = (weight, bias, shift, scale)
    if any(other.dtype != x.dtype or other.device != x.device for other in others):
        return f"every tensor must be {x.dtype} on {x.device}, as x is"
    return _extension.why_not(x)


def forward(
    x: Tensor,  # [B, N, D], text first
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    shift: Tensor,  # [B, 2, D], of text, then of vision
    scale: Tensor,  # [B, 2, D]
    num_text: int,
    eps: float,
) -> Tensor:  # [B, N, D]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        x, weight, bias, shift, scale = map(with_contiguous_rows, (x, weight, bias, shift, scale))
        _extension._C.expert_layernorm_forward(
            place(x), DTYPES[x.dtype], (*x.shape, num_text), eps,
            rows(x), weight.data_ptr(), bias.data_ptr(), rows(shift), rows(scale), rows(y),
        )  # fmt: skip
    return y


def backward(
    grad: Tensor,  # [B, N, D]
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    num_text: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # of x, weight, bias, shift, scale
    """The gradients, the same whatever the number of threads: rows are added up in chunks of a fixed size."""
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, weight, bias, shift, scale)]
    if not x.numel():
        return tuple(g.zero_() for g in grads)
    grad, x, weight, bias, shift, scale = map(with_contiguous_rows, (grad, x, weight, bias, shift, scale))
    b, n, d = x.shape
    chunk = _extension._C.EXPERT_LAYERNORM_CHUNK
    num_chunks = -(-num_text // chunk) + -(-(n - num_text) // chunk)
    in_double = x.dtype == torch.float64 or d <= _extension._C.EXPERT_LAYERNORM_NARROW
    sums_in = torch.float64 if in_double else torch.float32
    partials = torch.empty(b, num_chunks, 2, d, dtype=sums_in, device=x.device)
    grad_x, grad_weight, grad_bias, grad_shift, grad_scale = grads
    _extension._C.expert_layernorm_backward(
        place(x), DTYPES[x.dtype], (b, n, d, num_text), eps,
        rows(x), weight.data_ptr(), bias.data_ptr(), rows(shift), rows(scale),
        rows(grad), rows(grad_x), grad_weight.data_ptr(), grad_bias.data_ptr(), rows(grad_shift), rows(grad_scale),
        partials.data_ptr(),
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias, grad_shift, grad_scale
