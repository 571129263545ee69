"""`expert_layernorm` in Triton, for CUDA tensors, and for any tensor under TRITON_INTERPRET=1."""

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
    x, weight, bias, shift, scale, y, num_rows, num_text, width, eps,
    x_b, x_n, shift_b, shift_m, scale_b, scale_m,
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
    x += b * x_b + first.to(tl.int64) * x_n + columns
    y += (b * num_rows + first) * width + columns
    for _ in range(first, last):
        xhat, _ = normalize(load_row(x, inside, A), inside, width, eps)
        store_row(y, xhat * factor + offset, inside)
        x += x_n
        y += width


@triton.jit
def backward_kernel(
    grad, x, weight, scale, grad_x, partials, num_rows, num_text, width, eps,
    grad_b, grad_n, x_b, x_n, scale_b, scale_m,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With d = grad * weight * (1 + scale): grad_x = rstd * (d - mean(d) - xhat * mean(d * xhat)); the chunk's sums."""
    A: tl.constexpr = partials.dtype.element_ty
    first, last, m = chunk_of_program(num_rows, num_text, ROWS)
    b = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    factor = 1.0 + load_row(scale + b * scale_b + m * scale_m + columns, inside, A)
    factor *= load_row(weight + columns, inside, A)
    sum_grad = tl.zeros([BLOCK], A)
    sum_grad_xhat = tl.zeros([BLOCK], A)
    x += b * x_b + first.to(tl.int64) * x_n + columns
    grad += b * grad_b + first.to(tl.int64) * grad_n + columns
    grad_x += (b * num_rows + first) * width + columns
    for _ in range(first, last):
        xhat, rstd = normalize(load_row(x, inside, A), inside, width, eps)
        g = load_row(grad, inside, A)
        d = g * factor
        mean_d, mean_d_xhat = tl.sum(d, 0) / width, tl.sum(d * xhat, 0) / width
        store_row(grad_x, rstd * (d - mean_d - xhat * mean_d_xhat), inside)
        sum_grad += g
        sum_grad_xhat += g * xhat
        x += x_n
        grad += grad_n
        grad_x += width
    target = partials + (b * tl.num_programs(0) + tl.program_id(0)) * 2 * width + columns
    tl.store(target, sum_grad, mask=inside)
    tl.store(target + width, sum_grad_xhat, mask=inside)


def why_not(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, num_text: int, eps: float
) -> str | None:
    if (reason := why_not_there(x)) is not None:
        return reason
    if x.dtype not in _DTYPES or any(t.dtype != x.dtype for t in (weight, bias, shift, scale)):
        return "every tensor must be of one dtype: float32, float16 or bfloat16"
    return f"a width of {x.shape[-1]} is above {_MAX_WIDTH}" if x.shape[-1] > _MAX_WIDTH else None


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
    if not y.numel():
        return y
    x, weight, bias, shift, scale = map(with_contiguous_rows, (x, weight, bias, shift, scale))
    b, n, d = x.shape
    grid = (num_chunks(num_text, FORWARD_ROWS) + num_chunks(n - num_text, FORWARD_ROWS), b)
    with torch.cuda.device_of(x):
        forward_kernel[grid](
            x, weight, bias, shift, scale, y, n, num_text, d, eps,
            *x.stride()[:2], *shift.stride()[:2], *scale.stride()[:2], **options(d, FORWARD_ROWS),
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
    grad, x, weight, bias, shift, scale = map(with_contiguous_rows, (grad, x, weight, bias, shift, scale))
    b, n, d = x.shape
    num_text_chunks = num_chunks(num_text, BACKWARD_ROWS)
    grid = (num_text_chunks + num_chunks(n - num_text, BACKWARD_ROWS), b)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partials = torch.empty(b, grid[0], 2, d, dtype=sums_dtype(d), device=x.device)  # sums of grad and of grad * xhat
    if x.numel():
        with torch.cuda.device_of(x):
            backward_kernel[grid](
                grad, x, weight, scale, grad_x, partials, n, num_text, d, eps,
                *grad.stride()[:2], *x.stride()[:2], *scale.stride()[:2], **options(d, BACKWARD_ROWS),
            )  # fmt: skip
    sums = torch.stack([partials[:, :num_text_chunks].sum(1), partials[:, num_text_chunks:].sum(1)], dim=1)
    sum_grad, sum_grad_xhat = sums.unbind(2)  # [B, 2, D]
    modulation = 1 + scale.to(sums.dtype)
    grad_weight, grad_bias = (modulation * sum_grad_xhat).sum((0, 1)), (modulation * sum_grad).sum((0, 1))
    grad_scale = sum_grad_xhat * weight + sum_grad * bias
    return grad_x, *(g.to(x.dtype) for g in (grad_weight, grad_bias, sum_grad, grad_scale))
