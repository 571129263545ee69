"""`expert_layernorm` in CUDA C++; a row is read once and written once."""

import torch
from torch import Tensor

from .. import _extension
from . import compiled

FOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FOR_SHAPES = "rows of 9 to 4096 channels"  # narrower ones must be summed in double, and nobody has them


def why_not(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, num_text: int, eps: float
) -> str | None:
    return (
        compiled.why_not(x, weight, bias, shift, scale)
        or why_not_width(x.shape[-1])
        or _extension.why_not_cuda(x, FOR_DTYPES)
    )


def why_not_width(width: int) -> str | None:
    return None if 9 <= width <= 4096 else f"the CUDA kernel takes {FOR_SHAPES}, not {width}"


def forward(x: Tensor, *args: Tensor | int | float) -> Tensor:
    return compiled.forward(_extension.cuda(), _extension.cuda_place(x), x, *args)


def backward(grad: Tensor, *args: Tensor | int | float) -> tuple[Tensor, ...]:
    return compiled.backward(_extension.cuda(), _extension.cuda_place(grad), grad, *args)
