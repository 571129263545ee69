"""`qk_norm_rope` in CUDA C++; the fused projection is read once, q, k and v are written once."""

import torch
from torch import Tensor

from .. import _extension
from .._extension import DTYPES, cuda_place, rows, with_contiguous_rows
from . import compiled
from .compiled import addresses, heads, widened

FOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FOR_SHAPES = "head widths of 8 to 256"  # in narrower heads all of a gradient can cancel, and its errors stay


def why_not(
    qkv: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_text: int,
    num_heads: int,
    eps: float,
) -> str | None:
    width = q_weight.shape[0]
    if not 8 <= width <= 256:
        return f"the CUDA kernel takes {FOR_SHAPES}, not {width}"
    return _extension.why_not_cuda(qkv, FOR_DTYPES)


def forward(qkv: Tensor, *args: Tensor | int | float | None) -> tuple[Tensor, Tensor, Tensor]:
    return compiled.forward(_extension.cuda(), _extension.cuda_place(qkv), qkv, *args, narrow_angles=True)


def scratch(qkv: Tensor, *args: Tensor | int | float | None) -> list[Tensor | None]:
    """cos and sin where they are not read as they are."""
    cos, sin = args[4:6]
    return [*compiled.angles(qkv, cos, sin, narrow_angles=True)]


def backward(
    grad_q: Tensor,  # [B, A, N, E]
    grad_k: Tensor,  # [B, A, N, E]
    grad_v: Tensor,  # [B, A, N, E]
    qkv: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_text: int,
    num_heads: int,
    eps: float,
    *,
    needs: list[bool],  # of qkv, q_weight, q_bias, k_weight, k_bias, cos, sin
) -> tuple[Tensor | None, ...]:  # of the same
    """The gradients, the same in every run: rows are added up in chunks of a fixed size."""
    inputs = qkv, q_weight, q_bias, k_weight, k_bias
    b, n, width = qkv.shape
    e = width // (3 * num_heads)
    partials = qkv.new_empty(b, -(-n // _extension.cuda().QK_NORM_ROPE_CHUNK), 2, 2, e, dtype=torch.float64)
    by_part = (b, 2, n - num_text, e) if any(needs[5:]) else None
    grad_turns = [by_part and qkv.new_empty(by_part, dtype=torch.float32) for _ in range(2)]  # of cos and sin
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if qkv.numel():
        qkv, *norms = map(with_contiguous_rows, inputs)
        parts = [with_contiguous_rows(grad) for grad in (grad_q, grad_k, grad_v)]
        turns = widened(cos, qkv), widened(sin, qkv)
        _extension.cuda().qk_norm_rope_backward(
            cuda_place(qkv), DTYPES[qkv.dtype], (b, n, num_text, num_heads, e), eps,
            rows(qkv), addresses(*norms), addresses(*turns), tuple(map(heads, parts)),
            rows(grad_qkv), (0, 0, 0, 0), addresses(*grad_turns), partials.data_ptr(),
        )  # fmt: skip
    of_norms = (g.to(qkv.dtype, copy=True) for g in partials.sum((0, 1)).flatten(0, 1).unbind())
    of_turns = (
        grad if grad is None else grad.sum((0, 1), dtype=torch.float64).to(x.dtype)
        for grad, x in zip(grad_turns, (cos, sin), strict=True)
    )
    return grad_qkv, *of_norms, *of_turns
