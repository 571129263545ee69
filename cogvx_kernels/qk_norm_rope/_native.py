"""`qk_norm_rope` in C++ for CPUs; the fused projection is read once, q, k and v are written once."""

import torch
from torch import Tensor

from .. import _extension
from .._extension import DTYPES, place, rows, with_contiguous_rows
from . import compiled
from .compiled import addresses, heads, widened


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
    return _extension.why_not(qkv)


def forward(qkv: Tensor, *args: Tensor | int | float | None) -> tuple[Tensor, Tensor, Tensor]:
    return compiled.forward(_extension._C, _extension.place(qkv), qkv, *args, narrow_angles=False)


def scratch(qkv: Tensor, *args: Tensor | int | float | None) -> list[Tensor | None]:
    """cos and sin where they are not read as they are."""
    cos, sin = args[4:6]
    return [*compiled.angles(qkv, cos, sin, narrow_angles=False)]


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
    """The gradients, the same whatever the number of threads: rows are added up in chunks of a fixed size."""
    inputs = qkv, q_weight, q_bias, k_weight, k_bias
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in inputs]
    grad_cos, grad_sin = (torch.empty(x.shape, dtype=torch.float64) if any(needs[5:]) else None for x in (cos, sin))
    if qkv.numel():
        qkv, *norms = map(with_contiguous_rows, inputs)
        parts = [with_contiguous_rows(grad) for grad in (grad_q, grad_k, grad_v)]
        turns = widened(cos, qkv), widened(sin, qkv)
        b, n, width = qkv.shape
        e = width // (3 * num_heads)
        partials = torch.empty(-(-n // _extension._C.QK_NORM_ROPE_CHUNK), 2, 2, e, dtype=torch.float64)
        _extension._C.qk_norm_rope_backward(
            place(qkv), DTYPES[qkv.dtype], (b, n, num_text, num_heads, e), eps,
            rows(qkv), addresses(*norms), addresses(*turns), tuple(map(heads, parts)),
            rows(grads[0]), addresses(*grads[1:]), addresses(grad_cos, grad_sin), partials.data_ptr(),
        )  # fmt: skip
    else:
        grads = [g.zero_() for g in grads]
        grad_cos, grad_sin = (g if g is None else g.zero_() for g in (grad_cos, grad_sin))
    return *grads, *(g if g is None else g.to(x.dtype) for g, x in ((grad_cos, cos), (grad_sin, sin)))
