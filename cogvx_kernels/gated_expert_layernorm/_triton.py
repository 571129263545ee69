"""`gated_expert_layernorm` in Triton, for CUDA tensors, and for any tensor under TRITON_INTERPRET=1."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._extension import with_contiguous_rows
from .._triton_device import why_not_there
from .._triton_rows import NARROW, chunk_of_program, load_row, normalize, num_chunks, options, store_row, sums_dtype

# Rows of a program: enough to share the modulation, few enough to fill a GPU. Gradients are summed in these chunks.
FORWARD_ROWS, BACKWARD_ROWS = 8, 32
_MAX_WIDTH = 8192
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def forward_kernel(
    x, y, gate, weight, bias, shift, scale, x_new, normed, num_rows, num_text, width, eps,
    x_b, x_n, y_b, y_n, gate_b, gate_m, shift_b, shift_m, scale_b, scale_m,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = tl.float64 if BLOCK <= NARROW else tl.float32
    first, last, m = chunk_of_program(num_rows, num_text, ROWS)
    b = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    modulation = 1.0 + load_row(scale + b * scale_b + m * scale_m + columns, inside, A)
    factor = load_row(weight + columns, inside, A) * modulation
    offset = load_row(bias + columns, inside, A) * modulation
    offset += load_row(shift + b * shift_b + m * shift_m + columns, inside, A)
    g = load_row(gate + b * gate_b + m * gate_m + columns, inside, A)
    x += b * x_b + first.to(tl.int64) * x_n + columns
    y += b * y_b + first.to(tl.int64) * y_n + columns
    x_new += (b * num_rows + first) * width + columns
    normed += (b * num_rows + first) * width + columns
    for _ in range(first, last):
        total = (load_row(x, inside, A) + g * load_row(y, inside, A)).to(tl.float32).to(x_new.dtype.element_ty)
        tl.store(x_new, total, mask=inside)
        # The norm is that of the sum as it is stored.
        xhat, _ = normalize(total.to(tl.float32).to(A), inside, width, eps)
        store_row(normed, xhat * factor + offset, inside)
        x += x_n
        y += y_n
        x_new += width
        normed += width


@triton.jit
def backward_kernel(
    grad_x_new, grad_normed, x, y, gate, weight, scale, grad_x, grad_y, partials, num_rows, num_text, width, eps,
    grad_x_new_b, grad_x_new_n, grad_normed_b, grad_normed_n, x_b, x_n, y_b, y_n, gate_b, gate_m, scale_b, scale_m,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x is grad_x_new and what comes through the norm, grad_y = gate grad_x; the chunk's sums."""
    A: tl.constexpr = partials.dtype.element_ty
    first, last, m = chunk_of_program(num_rows, num_text, ROWS)
    b = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    factor = 1.0 + load_row(scale + b * scale_b + m * scale_m + columns, inside, A)
    factor *= load_row(weight + columns, inside, A)
    g = load_row(gate + b * gate_b + m * gate_m + columns, inside, A)
    sum_grad = tl.zeros([BLOCK], A)
    sum_grad_xhat = tl.zeros([BLOCK], A)
    sum_gate = tl.zeros([BLOCK], A)
    x += b * x_b + first.to(tl.int64) * x_n + columns
    y += b * y_b + first.to(tl.int64) * y_n + columns
    grad_x_new += b * grad_x_new_b + first.to(tl.int64) * grad_x_new_n + columns
    grad_normed += b * grad_normed_b + first.to(tl.int64) * grad_normed_n + columns
    grad_x += (b * num_rows + first) * width + columns
    grad_y += (b * num_rows + first) * width + columns
    for _ in range(first, last):
        added = load_row(y, inside, A)
        xhat, rstd = normalize(load_row(x, inside, A) + g * added, inside, width, eps)
        grad = load_row(grad_normed, inside, A)
        sum_grad += grad
        sum_grad_xhat += grad * xhat
        d = grad * factor
        mean_d, mean_d_xhat = tl.sum(d, 0) / width, tl.sum(d * xhat, 0) / width
        grad = load_row(grad_x_new, inside, A)
        grad += rstd * (d - mean_d - xhat * mean_d_xhat)
        sum_gate += grad * added
        store_row(grad_x, grad, inside)
        store_row(grad_y, grad * g, inside)
        x += x_n
        y += y_n
        grad_x_new += grad_x_new_n
        grad_normed += grad_normed_n
        grad_x += width
        grad_y += width
    target = partials + (b * tl.num_programs(0) + tl.program_id(0)) * 3 * width + columns
    tl.store(target, sum_grad, mask=inside)
    tl.store(target + width, sum_grad_xhat, mask=inside)
    tl.store(target + 2 * width, sum_gate, mask=inside)


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
    if (reason := why_not_there(x)) is not None:
        return reason
    if x.dtype not in _DTYPES or any(t.dtype != x.dtype for t in (y, gate, weight, bias, shift, scale)):
        return "every tensor must be of one dtype: float32, float16 or bfloat16"
    return f"a width of {x.shape[-1]} is above {_MAX_WIDTH}" if x.shape[-1] > _MAX_WIDTH else None


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
    x_new, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if not x.numel():
        return x_new, normed
    x, y, gate, weight, bias, shift, scale = map(with_contiguous_rows, (x, y, gate, weight, bias, shift, scale))
    b, n, d = x.shape
    grid = (num_chunks(num_text, FORWARD_ROWS) + num_chunks(n - num_text, FORWARD_ROWS), b)
    strides = [stride for t in (x, y, gate, shift, scale) for stride in t.stride()[:2]]
    with torch.cuda.device_of(x):
        forward_kernel[grid](
            x, y, gate, weight, bias, shift, scale, x_new, normed, n, num_text, d, eps, *strides,
            **options(d, FORWARD_ROWS),
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
    inputs = map(with_contiguous_rows, (grad_x_new, grad_normed, x, y, gate, weight, scale))
    grad_x_new, grad_normed, x, y, gate, weight, scale = inputs
    b, n, d = x.shape
    num_text_chunks = num_chunks(num_text, BACKWARD_ROWS)
    grid = (num_text_chunks + num_chunks(n - num_text, BACKWARD_ROWS), b)
    grad_x, grad_y = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    # Sums of grad_normed, of grad_normed * xhat and of grad_x * y.
    partials = torch.empty(b, grid[0], 3, d, dtype=sums_dtype(d), device=x.device)
    if x.numel():
        strides = [stride for t in (grad_x_new, grad_normed, x, y, gate, scale) for stride in t.stride()[:2]]
        with torch.cuda.device_of(x):
            backward_kernel[grid](
                grad_x_new, grad_normed, x, y, gate, weight, scale, grad_x, grad_y, partials, n, num_text, d, eps,
                *strides, **options(d, BACKWARD_ROWS),
            )  # fmt: skip
    sums = torch.stack([partials[:, :num_text_chunks].sum(1), partials[:, num_text_chunks:].sum(1)], dim=1)
    sum_grad, sum_grad_xhat, grad_gate = sums.unbind(2)  # [B, 2, D]
    modulation = 1 + scale.to(sums.dtype)
    grad_weight, grad_bias = (modulation * sum_grad_xhat).sum((0, 1)), (modulation * sum_grad).sum((0, 1))
    grad_scale = sum_grad_xhat * weight + sum_grad * bias
    small = (grad_gate, grad_weight, grad_bias, sum_grad, grad_scale)
    return grad_x, grad_y, *(g.to(x.dtype) for g in small)
