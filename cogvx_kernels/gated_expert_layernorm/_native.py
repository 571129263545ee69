"""`gated_expert_layernorm` in C++ for CPUs; every tensor is read once and written once."""

import torch
from torch import Tensor

from .. import _extension
from .._extension import DTYPES, place, rows, with_contiguous_rows


def why_not(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    num_text: int,
    eps: float,
) -> str | None:
    others = (y, gate, weight, bias, shift, scale)
    if any(other.dtype != x.dtype or other.device != x.device for other in others):
        return f"every tensor must be {x.dtype} on {x.device}, as x is"
    return _extension.why_not(x)


def forward(
    x: Tensor,  # [B, N, D], text first
    y: Tensor,  # [B, N, D]
    gate: Tensor,  # [B, 2, D], of text, then of vision
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    shift: Tensor,  # [B, 2, D]
    scale: Tensor,  # [B, 2, D]
    num_text: int,
    eps: float,
) -> tuple[Tensor, Tensor]:  # [B, N, D] each
    x_new, normed = (torch.empty(x.shape, dtype=x.dtype) for _ in range(2))
    if x.numel():
        inputs = map(with_contiguous_rows, (x, y, gate, weight, bias, shift, scale))
        x, y, gate, weight, bias, shift, scale = inputs
        _extension._C.gated_expert_layernorm_forward(
            place(x), DTYPES[x.dtype], (*x.shape, num_text), eps,
            rows(x), rows(y), rows(gate), weight.data_ptr(), bias.data_ptr(), rows(shift), rows(scale),
            rows(x_new), rows(normed),
        )  # fmt: skip
    return x_new, normed


def backward(
    grad_x_new: Tensor,  # [B, N, D]
    grad_normed: Tensor,  # [B, N, D]
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    num_text: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # of x, y, gate, weight, bias, shift, scale
    """The gradients, the same whatever the number of threads: rows are added up in chunks of a fixed size."""
    grads = [torch.empty(t.shape, dtype=t.dtype) for t in (x, y, gate, weight, bias, shift, scale)]
    if not x.numel():
        return tuple(g.zero_() for g in grads)
    inputs = map(with_contiguous_rows, (grad_x_new, grad_normed, x, y, gate, weight, bias, shift, scale))
    grad_x_new, grad_normed, x, y, gate, weight, bias, shift, scale = inputs
    b, n, d = x.shape
    chunk = _extension._C.EXPERT_LAYERNORM_CHUNK
    num_chunks = -(-num_text // chunk) + -(-(n - num_text) // chunk)
    in_double = x.dtype == torch.float64 or d <= _extension._C.EXPERT_LAYERNORM_NARROW
    sums_in = torch.float64 if in_double else torch.float32
    partials, gate_partials = (torch.empty(b, num_chunks, count, d, dtype=sums_in) for count in (2, 1))
    grad_x, grad_y, grad_gate, grad_weight, grad_bias, grad_shift, grad_scale = grads
    _extension._C.gated_expert_layernorm_backward(
        place(x), DTYPES[x.dtype], (b, n, d, num_text), eps,
        rows(x), rows(y), rows(gate), weight.data_ptr(), bias.data_ptr(), rows(shift), rows(scale),
        rows(grad_x_new), rows(grad_normed), rows(grad_x), rows(grad_y), rows(grad_gate),
        grad_weight.data_ptr(), grad_bias.data_ptr(), rows(grad_shift), rows(grad_scale),
        partials.data_ptr(), gate_partials.data_ptr(),
    )  # fmt: skip
    return tuple(grads)
