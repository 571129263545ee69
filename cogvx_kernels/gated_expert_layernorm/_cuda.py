"""`gated_expert_layernorm` in CUDA C++; every tensor is read once and written once."""

from torch import Tensor

from .. import _extension
from ..expert_layernorm.compiled import FOR_DTYPES, FOR_SHAPES, why_not_cuda
from . import compiled

__all__ = ["FOR_DTYPES", "FOR_SHAPES"]


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
    return why_not_cuda(x, y, gate, weight, bias, shift, scale)


def forward(x: Tensor, *args: Tensor | int | float) -> tuple[Tensor, Tensor]:
    return compiled.forward(_extension.cuda(), _extension.cuda_place(x), x, *args)


def backward(grad_x_new: Tensor, *args: Tensor | int | float) -> tuple[Tensor, ...]:
    return compiled.backward(_extension.cuda(), _extension.cuda_place(grad_x_new), grad_x_new, *args)
