"""`gated_expert_layernorm` by the compiled extension, on CPUs and on GPUs: what is allocated and handed over."""

from types import ModuleType

import torch
from torch import Tensor

from .._extension import DTYPES, Place, rows, with_contiguous_rows
from ..expert_layernorm.compiled import partial_sums


def forward(
    module: ModuleType,
    place: Place,
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
    x_new, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if x.numel():
        inputs = map(with_contiguous_rows, (x, y, gate, weight, bias, shift, scale))
        x, y, gate, weight, bias, shift, scale = inputs
        module.gated_expert_layernorm_forward(
            place, DTYPES[x.dtype], (*x.shape, num_text), eps,
            rows(x), rows(y), rows(gate), weight.data_ptr(), bias.data_ptr(), rows(shift), rows(scale),
            rows(x_new), rows(normed),
        )  # fmt: skip
    return x_new, normed


def backward(
    module: ModuleType,
    place: Place,
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
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, y, gate, weight, bias, shift, scale)]
    if not x.numel():
        return tuple(g.zero_() for g in grads)
    inputs = map(with_contiguous_rows, (grad_x_new, grad_normed, x, y, gate, weight, bias, shift, scale))
    grad_x_new, grad_normed, x, y, gate, weight, bias, shift, scale = inputs
    partials, gate_partials = (partial_sums(module, x, num_text, count) for count in (2, 1))
    grad_x, grad_y, grad_gate, grad_weight, grad_bias, grad_shift, grad_scale = grads
    module.gated_expert_layernorm_backward(
        place, DTYPES[x.dtype], (*x.shape, num_text), eps,
        rows(x), rows(y), rows(gate), weight.data_ptr(), bias.data_ptr(), rows(shift), rows(scale),
        rows(grad_x_new), rows(grad_normed), rows(grad_x), rows(grad_y), rows(grad_gate),
        grad_weight.data_ptr(), grad_bias.data_ptr(), rows(grad_shift), rows(grad_scale),
        partials.data_ptr(), gate_partials.data_ptr(),
    )  # fmt: skip
    return tuple(grads)
