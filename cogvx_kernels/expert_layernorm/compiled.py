"""`expert_layernorm` by the compiled extension, on CPUs and on GPUs: what is allocated, and what is handed over."""

from types import ModuleType

import torch
from torch import Tensor

from .. import _extension
from .._extension import DTYPES, Place, rows, with_contiguous_rows

FOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # on GPUs
FOR_SHAPES = "rows of 9 to 4096 channels"  # there; narrower ones must be summed in double, and nobody has them


def why_not(x: Tensor, *others: Tensor) -> str | None:
    if any(other.dtype != x.dtype or other.device != x.device for other in others):
        return f"every tensor must be {x.dtype} on {x.device}, as x is"
    return None


def why_not_cuda(x: Tensor, *others: Tensor) -> str | None:
    if not 9 <= x.shape[-1] <= 4096:
        return f"the CUDA kernel takes {FOR_SHAPES}, not {x.shape[-1]}"
    return why_not(x, *others) or _extension.why_not_cuda(x, FOR_DTYPES)


def forward(
    module: ModuleType,
    place: Place,
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
        module.expert_layernorm_forward(
            place, DTYPES[x.dtype], (*x.shape, num_text), eps,
            rows(x), weight.data_ptr(), bias.data_ptr(), rows(shift), rows(scale), rows(y),
        )  # fmt: skip
    return y


def backward(
    module: ModuleType,
    place: Place,
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
    grad_x, grad_weight, grad_bias, grad_shift, grad_scale = grads
    partials = partial_sums(module, x, num_text, 2)
    module.expert_layernorm_backward(
        place, DTYPES[x.dtype], (*x.shape, num_text), eps,
        rows(x), weight.data_ptr(), bias.data_ptr(), rows(shift), rows(scale),
        rows(grad), rows(grad_x), grad_weight.data_ptr(), grad_bias.data_ptr(), rows(grad_shift), rows(grad_scale),
        partials.data_ptr(),
    )  # fmt: skip
    return tuple(grads)


def partial_sums(module: ModuleType, x: Tensor, num_text: int, count: int) -> Tensor:  # [B, chunks, count, D]
    """Room for so many sums over each chunk of rows."""
    b, n, d = x.shape
    chunk = module.EXPERT_LAYERNORM_CHUNK
    num_chunks = -(-num_text // chunk) + -(-(n - num_text) // chunk)
    in_double = x.dtype == torch.float64 or d <= module.EXPERT_LAYERNORM_NARROW
    return x.new_empty(b, num_chunks, count, d, dtype=torch.float64 if in_double else torch.float32)
