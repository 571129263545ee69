"""`int8_joint_attention` in Triton, for CUDA tensors, and for any tensor under TRITON_INTERPRET=1."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_device import why_not_there
from .reference import KEYS, QUERIES, SMALLEST_PEAK, mean_of_tokens

_MAX_WIDTH = 128
_MAX_STRIDE = 2**23  # of a token; within a tile offsets are 32-bit
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_QUERY_GROUP, _KEY_GROUP = tl.constexpr(QUERIES), tl.constexpr(KEYS)
_SMALLEST_PEAK = tl.constexpr(SMALLEST_PEAK)
_ROUNDING = tl.constexpr(1.5 * 2**23)  # float32 has no digits after the point from here on


@triton.jit
def _place(num_tiles, num_heads, SIZE: tl.constexpr):
    """Batch entry, head and first token of this program."""
    index = tl.program_id(0)
    head = index // num_tiles % num_heads
    b = index // num_tiles // num_heads
    return b.to(tl.int64), head.to(tl.int64), index % num_tiles * SIZE


@triton.jit
def _load(x, first, end, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """SIZE rows of x from `first` on, zeros outside; WHOLE promises that every row is inside."""
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, BLOCK)[None, :]
    x += tl.cast(first, tl.int64) * stride
    x += rows * stride + columns
    if WHOLE and WIDTH == BLOCK:
        tile = tl.load(x)
    elif WHOLE:
        tile = tl.load(x, mask=columns < WIDTH, other=0)
    else:
        tile = tl.load(x, mask=(rows < end - first) & (columns < WIDTH), other=0)
    return tile


@triton.jit
def quantize_kernel(
    x, mean, integers, scales, num_tiles, num_heads, num_tokens, x_b, x_a, x_n,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group of tokens, less the mean of its head if there is one, as int8 and a scale."""
    b, a, first = _place(num_tiles, num_heads, SIZE)
    head = b * num_heads + a
    tile = _load(x + b * x_b + a * x_a, first, num_tokens, x_n, SIZE, WIDTH, BLOCK, False).to(tl.float32)
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_tokens - first) & (columns < WIDTH)
    if mean is not None:
        tile = tl.where(inside, tile - tl.load(mean + head * WIDTH + columns, mask=columns < WIDTH, other=0.0), 0.0)
    # A NaN would be lost in a maximum; infinite, it makes the whole group NaN as it does in plain PyTorch.
    magnitude = tl.where(tile == tile, tl.abs(tile), float("inf"))
    peak = tl.maximum(tl.max(tl.max(magnitude, 1), 0), _SMALLEST_PEAK)
    scale = peak * (1 / 127)
    whole = tile * tl.div_rn(1.0, scale) + _ROUNDING - _ROUNDING
    integers += (head * num_tokens + first) * WIDTH
    tl.store(integers + rows * WIDTH + columns, whole.to(tl.int8), mask=inside)
    tl.store(scales + head * num_tiles + first // SIZE, scale)


@triton.jit
def _visit_keys(
    queries, k, v, k_scales, v_n, first, end, bits, peak, total, sums,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Take a tile of keys into the running softmax: its peak in bits, its total, the weighted sums of values."""
    scores = tl.dot(queries, tl.trans(_load(k, first, end, WIDTH, KEYS, WIDTH, BLOCK, WHOLE))).to(tl.float32)
    bits *= tl.load(k_scales + first // _KEY_GROUP)
    if not WHOLE:
        scores = tl.where((tl.arange(0, KEYS) < end - first)[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * bits)
    weights = tl.exp2(scores * bits - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    values = _load(v, first, end, v_n, KEYS, WIDTH, BLOCK, WHOLE)
    rounded = weights.to(values.dtype)
    if _INTERPRETED:  # where bfloat16 would be multiplied as the integers that hold it
        rounded, values = rounded.to(tl.float32), values.to(tl.float32)
    sums = tl.dot(rounded, values, sums * decay[:, None], input_precision="ieee")
    return new_peak, total * decay + tl.sum(weights, 1), sums


@triton.jit
def attention_kernel(
    q, k, v, q_scales, k_scales, y, num_tiles, num_heads, num_tokens, bits, v_b, v_a, v_n,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of queries; q and k are dense int8, and a tile is never larger than a group with one scale."""
    b, a, row = _place(num_tiles, num_heads, QUERIES)
    head = b * num_heads + a
    q += head * num_tokens * WIDTH
    k += head * num_tokens * WIDTH
    v += b * v_b + a * v_a
    k_scales += head * tl.cdiv(num_tokens, _KEY_GROUP)
    bits *= tl.load(q_scales + head * tl.cdiv(num_tokens, _QUERY_GROUP) + row // _QUERY_GROUP)
    queries = _load(q, row, num_tokens, WIDTH, QUERIES, WIDTH, BLOCK, False)
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, BLOCK], tl.float32)
    last = (num_tokens - 1) // KEYS * KEYS
    for first in range(0, last, KEYS):
        peak, total, sums = _visit_keys(
            queries, k, v, k_scales, v_n, first, num_tokens, bits, peak, total, sums, KEYS, WIDTH, BLOCK, True
        )
    peak, total, sums = _visit_keys(
        queries, k, v, k_scales, v_n, last, num_tokens, bits, peak, total, sums, KEYS, WIDTH, BLOCK, False
    )
    rows, columns = tl.arange(0, QUERIES)[:, None], tl.arange(0, BLOCK)[None, :]
    y += ((b * num_tokens + row) * num_heads + a) * WIDTH
    inside = (rows < num_tokens - row) & (columns < WIDTH)
    tl.store(y + rows * num_heads * WIDTH + columns, (sums / total[:, None]).to(y.dtype.element_ty), mask=inside)


KERNELS = {"quantize": quantize_kernel, "attention": attention_kernel}


def options(kernel: str, dtype: torch.dtype, width: int, capability: int) -> dict:
    """The compile-time arguments of a kernel; capability is 90 for sm_90, and 0 for the interpreter."""
    chosen = {"WIDTH": width, "BLOCK": max(triton.next_power_of_2(width), 32)}  # int8 is multiplied 32 at a time
    if kernel == "quantize":
        # Plain PyTorch multiplies and rounds in two steps, and a key that rounds otherwise would be another key.
        return chosen | {"num_warps": 4, "enable_fp_fusion": False}
    if capability == 0:
        queries, keys, warps, stages = 64, 32, 4, 1
    elif dtype == torch.float32:
        queries, keys, warps, stages = 32, 16, 4, 1
    else:
        queries, keys, warps, stages = 128, 64, 4 if width <= 64 else 8, 3
    return chosen | {
        "QUERIES": queries, "KEYS": keys, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True
    }  # fmt: skip


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if (reason := why_not_there(q)) is not None:
        return reason
    if q.dtype not in _DTYPES or any(x.dtype != q.dtype for x in (k, v)):
        return "every tensor must be of one dtype: float32, float16 or bfloat16"
    return f"a head width of {q.shape[-1]} is above {_MAX_WIDTH}" if q.shape[-1] > _MAX_WIDTH else None


def forward(
    q: Tensor,  # [B, A, N, E]
    k: Tensor,  # [B, A, N, E]
    v: Tensor,  # [B, A, N, E]
) -> Tensor:  # [B, N, A E]
    b, a, n, e = q.shape
    y = torch.empty(b, n, a * e, dtype=q.dtype, device=q.device)
    if not y.numel():
        return y
    v = _with_close_rows(v)
    chosen = options("attention", q.dtype, e, _capability(q))
    num_tiles = -(-n // chosen["QUERIES"])
    with torch.cuda.device_of(q):
        q8, q_scales = _quantize(q, None, QUERIES)
        k8, k_scales = _quantize(k, mean_of_tokens(k), KEYS)
        attention_kernel[(num_tiles * a * b,)](
            q8, k8, v, q_scales, k_scales, y, num_tiles, a, n, math.log2(math.e) / math.sqrt(e), *v.stride()[:3],
            **chosen,
        )  # fmt: skip
    return y


def scratch(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Queries and keys in 8 bits with their scales, and the keys' mean."""
    return [mean_of_tokens(k), *_rounded(q, QUERIES), *_rounded(k, KEYS)] if q.numel() else []


def _rounded(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Memory for x in int8, and for the scale of each group of `size` tokens."""
    b, a, n, _ = x.shape
    integers = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return integers, torch.empty(b, a, -(-n // size), dtype=torch.float32, device=x.device)


def _quantize(x: Tensor, mean: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """x less its mean in int8, and the scale of each group of `size` tokens."""
    b, a, n, e = x.shape
    x = _with_close_rows(x)
    num_groups = -(-n // size)
    integers, scales = _rounded(x, size)
    quantize_kernel[(num_groups * a * b,)](
        x, mean, integers, scales, num_groups, a, n, *x.stride()[:3],
        SIZE=size, **options("quantize", x.dtype, e, _capability(x)),
    )  # fmt: skip
    return integers, scales


def _capability(x: Tensor) -> int:
    if triton.knobs.runtime.interpret:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return major * 10 + minor


def _with_close_rows(x: Tensor) -> Tensor:
    """`x`, or a copy where its rows are strided or far apart."""
    close = (x.shape[-1] < 2 or x.stride(-1) == 1) and x.stride(-2) < _MAX_STRIDE
    return x if close else x.contiguous()
