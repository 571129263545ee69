"""`qk_norm_rope` in Triton, for CUDA tensors, and for any tensor under TRITON_INTERPRET=1."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._extension import with_contiguous_rows
from .._triton_device import why_not_there
from .compiled import is_narrow

# Values of a head that a program holds at a time: backward, sums stand beside them in registers, and more of these
# where cos and sin get gradients.
FORWARD_VALUES, BACKWARD_VALUES, ANGLE_VALUES = 2048, 1024, 512
# Heads of a backward program: its sums over tokens and heads are one line of what is added up afterwards.
BACKWARD_HEADS = 8
FOR_SHAPES = "head widths of 8 to 1024"  # in narrower heads all of a gradient can cancel, and its errors stay
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _normalize(x, inside, width, eps):
    """xhat = (x - mean) / sqrt(variance + eps) of every row, and the factor; centered twice, against large means."""
    centered = tl.where(inside, x - (tl.sum(x, 1) / width)[:, None], 0.0)
    centered = tl.where(inside, centered - (tl.sum(centered, 1) / width)[:, None], 0.0)
    rstd = (1.0 / tl.sqrt(tl.sum(centered * centered, 1) / width + eps))[:, None]
    return centered * rstd, rstd


@triton.jit
def _across(x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(-x[2i+1], x[2i]) for every pair."""
    even, odd = tl.split(tl.reshape(x, [ROWS, BLOCK // 2, 2]))
    return tl.reshape(tl.join(-odd, even), [ROWS, BLOCK])


@triton.jit
def _rows(num_rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows and columns of this program, and which of them exist."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    return n, columns, (n < num_rows) & (columns < width)


@triton.jit
def _load(x, inside):
    return tl.load(x, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _forward_head(x, y, inside, weight, bias, cos, sin, is_vision, width, eps,
                  TURN: tl.constexpr, ROUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    xhat, _ = _normalize(_load(x, inside), inside, width, eps)
    z = xhat * weight + bias
    if TURN:
        if ROUNDED:
            held: tl.constexpr = y.dtype.element_ty
            v = z.to(held).to(tl.float32)
            by_cos, by_sin = (v * cos).to(held).to(tl.float32), (_across(v, ROWS, BLOCK) * sin).to(held).to(tl.float32)
            z = tl.where(is_vision, by_cos + by_sin, z)
        else:
            z = tl.where(is_vision, z * cos + _across(z, ROWS, BLOCK) * sin, z)
    tl.store(y, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def forward_kernel(
    qkv, q_weight, q_bias, k_weight, k_bias, cos, sin, q, k, v, num_rows, num_text, num_heads, width, eps,
    qkv_b, qkv_n,
    TURN: tl.constexpr, ROUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, columns, inside = _rows(num_rows, width, ROWS, BLOCK)
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    is_vision = n >= num_text
    turn, across = 0.0, 0.0
    if TURN:
        angle = (n - num_text) * width + columns
        turn, across = _load(cos + angle, inside & is_vision), _load(sin + angle, inside & is_vision)
    x = qkv + b * qkv_b + n * qkv_n + head * width + columns
    part = num_heads * width
    y = ((b * num_heads + head) * num_rows + n) * width + columns
    within = columns < width
    weight, bias = _load(q_weight + columns, within), _load(q_bias + columns, within)
    _forward_head(x, q + y, inside, weight, bias, turn, across, is_vision, width, eps, TURN, ROUNDED, ROWS, BLOCK)
    weight, bias = _load(k_weight + columns, within), _load(k_bias + columns, within)
    _forward_head(x + part, k + y, inside, weight, bias, turn, across, is_vision, width, eps, TURN, ROUNDED, ROWS,
                  BLOCK)  # fmt: skip
    tl.store(v + y, tl.load(x + 2 * part, mask=inside, other=0.0), mask=inside)


@triton.jit
def _backward_heads(
    x, grad_y, grad_x, first, last, stride_a, weight, bias, cos, sin, is_vision, inside, width, eps, sums,
    grad_cos, grad_sin,
    TURN: tl.constexpr, ANGLES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With g the gradient turned back and d = g * weight: grad_x = rstd * (d - mean(d) - xhat * mean(d * xhat)).

    Stores the sums of g * xhat and of g over rows and heads; returns the gradients of cos and sin, these added.
    """
    sum_g_xhat = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_g = tl.zeros([ROWS, BLOCK], tl.float32)
    x += first * width
    grad_x += first * width
    grad_y += first.to(tl.int64) * stride_a
    for _ in range(first, last):
        xhat, rstd = _normalize(_load(x, inside), inside, width, eps)
        g = _load(grad_y, inside)
        if TURN:
            if ANGLES:
                z = xhat * weight + bias
                grad_cos += g * z
                grad_sin += g * _across(z, ROWS, BLOCK)
            g = tl.where(is_vision, g * cos - _across(g * sin, ROWS, BLOCK), g)
        d = g * weight
        mean_d, mean_d_xhat = tl.sum(d, 1) / width, tl.sum(d * xhat, 1) / width
        result = rstd * (d - mean_d[:, None] - xhat * mean_d_xhat[:, None])
        tl.store(grad_x, result.to(grad_x.dtype.element_ty), mask=inside)
        sum_g_xhat += g * xhat
        sum_g += g
        x += width
        grad_x += width
        grad_y += stride_a
    columns = tl.arange(0, BLOCK)
    tl.store(sums + columns, tl.sum(sum_g_xhat.to(tl.float64), 0), mask=columns < width)
    tl.store(sums + width + columns, tl.sum(sum_g.to(tl.float64), 0), mask=columns < width)
    return grad_cos, grad_sin


@triton.jit
def backward_kernel(
    grad_q, grad_k, grad_v, qkv, q_weight, q_bias, k_weight, k_bias, cos, sin, grad_qkv, partials, angles,
    num_rows, num_text, num_heads, width, eps,
    grad_q_b, grad_q_a, grad_q_n, grad_k_b, grad_k_a, grad_k_n, grad_v_b, grad_v_a, grad_v_n, qkv_b, qkv_n,
    TURN: tl.constexpr, ANGLES: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, columns, inside = _rows(num_rows, width, ROWS, BLOCK)
    b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * HEADS
    last = tl.minimum(first + HEADS, num_heads)
    is_vision = n >= num_text
    angle = (n - num_text) * width + columns
    turn, across = 0.0, 0.0
    grad_cos = tl.zeros([ROWS, BLOCK], tl.float32)
    grad_sin = tl.zeros([ROWS, BLOCK], tl.float32)
    if TURN:
        turn, across = _load(cos + angle, inside & is_vision), _load(sin + angle, inside & is_vision)
    part = num_heads * width
    x = qkv + b * qkv_b + n * qkv_n + columns
    grad_x = grad_qkv + (b * num_rows + n) * 3 * part + columns
    group = b * tl.num_programs(1) + tl.program_id(1)  # of heads, over all samples
    sums = partials + (group * tl.num_programs(0) + tl.program_id(0)) * 4 * width
    within = columns < width
    weight, bias = _load(q_weight + columns, within), _load(q_bias + columns, within)
    grad_cos, grad_sin = _backward_heads(
        x, grad_q + b * grad_q_b + n * grad_q_n + columns, grad_x, first, last, grad_q_a, weight, bias, turn, across,
        is_vision, inside, width, eps, sums, grad_cos, grad_sin, TURN, ANGLES, ROWS, BLOCK,
    )  # fmt: skip
    weight, bias = _load(k_weight + columns, within), _load(k_bias + columns, within)
    grad_cos, grad_sin = _backward_heads(
        x + part, grad_k + b * grad_k_b + n * grad_k_n + columns, grad_x + part, first, last, grad_k_a, weight, bias,
        turn, across, is_vision, inside, width, eps, sums + 2 * width, grad_cos, grad_sin, TURN, ANGLES, ROWS, BLOCK,
    )  # fmt: skip
    grad_v += b * grad_v_b + n * grad_v_n + first.to(tl.int64) * grad_v_a + columns
    grad_x += 2 * part + first * width
    for _ in range(first, last):
        tl.store(grad_x, tl.load(grad_v, mask=inside, other=0.0), mask=inside)
        grad_v += grad_v_a
        grad_x += width
    if ANGLES:
        size = tl.cast(num_rows - num_text, tl.int64) * width
        target = angles + group * 2 * size + angle
        tl.store(target, grad_cos, mask=inside & is_vision)
        tl.store(target + size, grad_sin, mask=inside & is_vision)


def options(width: int, values: int) -> dict:
    """The compile-time arguments that both kernels share."""
    block = triton.next_power_of_2(width)
    return {
        "ROWS": max(values // block, 1),
        "BLOCK": block,
        "num_warps": 4,
        # A product that is fused into one sum and not into another leaves a difference where there is none.
        "enable_fp_fusion": False,
    }


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
    if (reason := why_not_there(qkv)) is not None:
        return reason
    if qkv.dtype not in _DTYPES:
        return "every tensor must be of one dtype: float32, float16 or bfloat16"
    width = q_weight.shape[0]
    return None if 8 <= width <= 1024 else f"the Triton kernel takes {FOR_SHAPES}, not {width}"


def forward(
    qkv: Tensor,  # [B, N, 3 A E], text first
    q_weight: Tensor,  # [E]
    q_bias: Tensor,  # [E]
    k_weight: Tensor,  # [E]
    k_bias: Tensor,  # [E]
    cos: Tensor | None,  # [N - num_text, E]
    sin: Tensor | None,  # [N - num_text, E]
    num_text: int,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, A, N, E] each
    b, n, width = qkv.shape
    e = width // (3 * num_heads)
    q, k, v = (torch.empty(b, num_heads, n, e, dtype=qkv.dtype, device=qkv.device) for _ in range(3))
    if not qkv.numel():
        return q, k, v
    qkv, *norms = map(with_contiguous_rows, (qkv, q_weight, q_bias, k_weight, k_bias))
    settings = options(e, FORWARD_VALUES)
    grid = (triton.cdiv(n, settings["ROWS"]), num_heads, b)
    with torch.cuda.device_of(qkv):
        forward_kernel[grid](
            qkv, *norms, *_angles(cos, sin, norms[0]), q, k, v, n, num_text, num_heads, e, eps, *qkv.stride()[:2],
            TURN=cos is not None, ROUNDED=cos is not None and is_narrow(cos, sin, qkv), **settings,
        )  # fmt: skip
    return q, k, v


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
    b, n, width = qkv.shape
    e = width // (3 * num_heads)
    wants_angles = any(needs[5:])
    settings = options(e, ANGLE_VALUES if wants_angles else BACKWARD_VALUES)
    grid = (triton.cdiv(n, settings["ROWS"]), triton.cdiv(num_heads, BACKWARD_HEADS), b)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    partials = qkv.new_empty(b * grid[1], grid[0], 2, 2, e, dtype=torch.float64)
    angles = qkv.new_empty(b * grid[1], 2, (n - num_text) * wants_angles, e, dtype=torch.float32)
    if qkv.numel():
        qkv, *norms = map(with_contiguous_rows, (qkv, q_weight, q_bias, k_weight, k_bias))
        grads = [with_contiguous_rows(grad) for grad in (grad_q, grad_k, grad_v)]
        with torch.cuda.device_of(qkv):
            backward_kernel[grid](
                *grads, qkv, *norms, *_angles(cos, sin, norms[0]), grad_qkv, partials, angles,
                n, num_text, num_heads, e, eps,
                *(stride for grad in grads for stride in grad.stride()[:3]), *qkv.stride()[:2],
                TURN=cos is not None, ANGLES=wants_angles, HEADS=BACKWARD_HEADS, **settings,
            )  # fmt: skip
    sums = (g.to(qkv.dtype, copy=True) for g in partials.sum((0, 1)).flatten(0, 1).unbind())
    turns = zip(angles.sum(0, dtype=torch.float64), (cos, sin), strict=True)
    return grad_qkv, *sums, *((g.to(x.dtype, copy=True) if wants_angles else None) for g, x in turns)


def _angles(cos: Tensor | None, sin: Tensor | None, otherwise: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin as the kernels read them; without them some tensor stands in that is not read."""
    return (otherwise, otherwise) if cos is None or sin is None else (cos.contiguous(), sin.contiguous())
