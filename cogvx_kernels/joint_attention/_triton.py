"""`joint_attention` in Triton, for CUDA tensors, and for any tensor under TRITON_INTERPRET=1.

A program owns a tile of rows of one head and visits the tiles of the other side; scores never leave the chip. Every
sum has one owner, so that results repeat bit for bit.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_device import why_not_there
from ._triton_tiles import options
from .reference import lse_dtype
from .tiles import tiles as table_of_tiles

FOR_SHAPES = "head widths of 8 to 128"  # in narrower heads all of a gradient can cancel, and its errors stay
_MAX_STRIDE = 2**23  # of a token; within a tile offsets are 32-bit
_BITS = tl.constexpr(math.log2(math.e))  # turns an exponent to e into one to 2
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _place(tiles, num_tiles, num_heads, num_tokens, SIZE: tl.constexpr):
    """Batch entry, head and first row of this program, first row of its sample and the row after the last."""
    index = tl.program_id(0)
    tile = index % num_tiles
    head = index // num_tiles % num_heads
    b = index // num_tiles // num_heads
    if tiles is None:
        row, start, end = tile * SIZE, tile * 0, tile * 0 + num_tokens
    else:
        row, start, end = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    return b.to(tl.int64), head.to(tl.int64), row, start, end


@triton.jit
def _load(
    x, first, end, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, skip=0
):
    """BLOCK channels of SIZE rows, from channel `skip` and row `first` on, zeros outside; WHOLE: no row is outside."""
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, BLOCK)[None, :] + skip
    x += tl.cast(first, tl.int64) * stride
    x += rows * stride + columns
    if WHOLE and WIDTH % BLOCK == 0:
        tile = tl.load(x)
    else:
        tile = tl.load(x, mask=(rows < end - first) & (columns < WIDTH), other=0.0)
    return tile


@triton.jit
def _store(x, tile, first, end, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, BLOCK)[None, :]
    x += tl.cast(first, tl.int64) * stride
    x += rows * stride + columns
    tl.store(x, tile.to(x.dtype.element_ty), mask=(rows < end - first) & (columns < WIDTH))


@triton.jit
def _multiply(a, b, sums, SWAP: tl.constexpr = False):
    """a b in full precision, added to `sums`: float32 must not become tf32.

    numpy, which interprets, rounds by shape and order; with SWAP it multiplies as the other kernel does, because a
    score must be the same in both. It would also take bfloat16 for the integers that hold it.
    """
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if _INTERPRETED and SWAP:
        sums = tl.trans(tl.dot(tl.trans(b), tl.trans(a), tl.trans(sums), input_precision="ieee"))
    else:
        sums = tl.dot(a, b, sums, input_precision="ieee")
    return sums


@triton.jit
def _products(
    x_tile, y_tile, x, x_n, x_first, y, y_n, y_first, end, X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SWAP: tl.constexpr = False,
):  # fmt: skip
    """The inner products of the rows of two tiles, read again by CHUNK channels where registers are too few for all.

    That is always so in float32: without tensor cores a thread holds all channels of its rows.
    """
    products = tl.zeros([X_ROWS, Y_ROWS], tl.float32)
    if CHUNK == BLOCK:
        products = _multiply(x_tile, tl.trans(y_tile), products, SWAP)
    else:
        for c in range(0, WIDTH, CHUNK):
            x_chunk = _load(x, x_first, end, x_n, X_ROWS, WIDTH, CHUNK, False, c)
            y_chunk = _load(y, y_first, end, y_n, Y_ROWS, WIDTH, CHUNK, False, c)
            products = _multiply(x_chunk, tl.trans(y_chunk), products, SWAP)
    return products


@triton.jit
def _weigh(scores, first, end, scale, peak, KEYS: tl.constexpr, WHOLE: tl.constexpr, FUSED: tl.constexpr):
    """The next tile of an online softmax: the new peak, weights under it, what earlier weights shrink by.

    FUSED takes one instruction from score to exponent. The other way the largest weight is 2^0 and no less, and the
    rest are as accurate as their scores.
    """
    if not WHOLE:
        scores = tl.where((tl.arange(0, KEYS) < end - first)[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # before any score above -inf, no weight
    bits = scale * _BITS
    exponents = scores * bits - (finite * bits)[:, None] if FUSED else (scores - finite[:, None]) * bits
    return new_peak, tl.exp2(exponents), tl.exp2((peak - finite) * bits)


@triton.jit
def _visit_keys(
    queries, q, k, v, q_n, k_n, v_n, row, first, end, scale, peak, total, sums, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to the weighted sums of values."""
    keys = _load(k, first, end, k_n, KEYS, WIDTH, BLOCK, WHOLE)
    scores = _products(queries, keys, q, q_n, row, k, k_n, first, end, QUERIES, KEYS, WIDTH, BLOCK, CHUNK)
    peak, weights, decay = _weigh(scores, first, end, scale, peak, KEYS, WHOLE, k.dtype.element_ty != tl.float32)
    values = _load(v, first, end, v_n, KEYS, WIDTH, BLOCK, WHOLE)
    sums = _multiply(weights.to(values.dtype), values, sums * decay[:, None])
    return peak, total * decay + tl.sum(weights, 1), sums


@triton.jit
def forward_kernel(
    q, k, v, y, lse, tiles, num_tiles, num_heads, num_tokens, scale,
    q_b, q_a, q_n, k_b, k_a, k_n, v_b, v_a, v_n,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    b, a, row, start, end = _place(tiles, num_tiles, num_heads, num_tokens, QUERIES)
    q += b * q_b + a * q_a
    k += b * k_b + a * k_a
    v += b * v_b + a * v_a
    queries = _load(q, row, end, q_n, QUERIES, WIDTH, BLOCK, False)
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, BLOCK], tl.float32)
    last = start + (end - start - 1) // KEYS * KEYS
    for first in range(start, last, KEYS):
        peak, total, sums = _visit_keys(
            queries, q, k, v, q_n, k_n, v_n, row, first, end, scale, peak, total, sums,
            QUERIES, KEYS, WIDTH, BLOCK, CHUNK, True,
        )  # fmt: skip
    peak, total, sums = _visit_keys(
        queries, q, k, v, q_n, k_n, v_n, row, last, end, scale, peak, total, sums,
        QUERIES, KEYS, WIDTH, BLOCK, CHUNK, False,
    )  # fmt: skip
    if lse is not None:
        inside = tl.arange(0, QUERIES) < end - row
        lse += (b * num_heads + a) * num_tokens + row
        tl.store(lse + tl.arange(0, QUERIES), peak * scale + tl.log(total), mask=inside)
    y += (b * num_tokens * num_heads + a) * WIDTH
    _store(y, sums / total[:, None], row, end, num_heads * WIDTH, QUERIES, WIDTH, BLOCK)


@triton.jit
def _visit_keys_for_statistics(
    queries, grads, grad, q, k, v, grad_n, q_n, k_n, v_n, row, first, end, scale, peak, total, delta,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    keys = _load(k, first, end, k_n, KEYS, WIDTH, BLOCK, WHOLE)
    values = _load(v, first, end, v_n, KEYS, WIDTH, BLOCK, WHOLE)
    scores = _products(queries, keys, q, q_n, row, k, k_n, first, end, QUERIES, KEYS, WIDTH, BLOCK, CHUNK)
    peak, weights, decay = _weigh(scores, first, end, scale, peak, KEYS, WHOLE, False)
    of_weights = _products(grads, values, grad, grad_n, row, v, v_n, first, end, QUERIES, KEYS, WIDTH, BLOCK, CHUNK)
    return peak, total * decay + tl.sum(weights, 1), delta * decay + tl.sum(weights * of_weights, 1)


@triton.jit
def _visit_keys_for_gradient(
    queries, grads, peak, share, delta, of_lse, grad, q, k, v, grad_n, q_n, k_n, v_n, row, first, end, scale, sums,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Add what one tile of keys gives to the gradient of the queries."""
    keys = _load(k, first, end, k_n, KEYS, WIDTH, BLOCK, WHOLE)
    values = _load(v, first, end, v_n, KEYS, WIDTH, BLOCK, WHOLE)
    scores = _products(queries, keys, q, q_n, row, k, k_n, first, end, QUERIES, KEYS, WIDTH, BLOCK, CHUNK)
    weights = tl.exp2((scores - peak[:, None]) * (scale * _BITS)) * share[:, None]
    if not WHOLE:
        weights = tl.where((tl.arange(0, KEYS) < end - first)[None, :], weights, 0.0)
    of_weights = _products(grads, values, grad, grad_n, row, v, v_n, first, end, QUERIES, KEYS, WIDTH, BLOCK, CHUNK)
    of_scores = of_weights - delta[:, None]
    if of_lse is not None:
        of_scores += of_lse[:, None]
    of_scores = weights * of_scores * scale
    return _multiply(of_scores.to(keys.dtype), keys, sums)


@triton.jit
def queries_backward_kernel(
    grad, q, k, v, grad_q, peaks, shares, deltas, grad_lse, tiles, num_tiles, num_heads, num_tokens, scale,
    grad_b, grad_n, q_b, q_a, q_n, k_b, k_a, k_n, v_b, v_a, v_n,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """With p the weights and ds = p * (grad v^T - delta) / sqrt(E): grad_q = ds k.

    A first pass over the keys finds the peak of the scores, the share of a weight of 1 in the sum of weights and
    delta = sum(p * grad v^T), which the keys need too. delta is sum(grad * y) as well, but rounded otherwise: where one
    key takes all the weight, the difference must be nothing, not noise. What lse passes on is p times its gradient,
    which is added to that difference: taken from a large delta it would be lost.
    """
    b, a, row, start, end = _place(tiles, num_tiles, num_heads, num_tokens, QUERIES)
    q += b * q_b + a * q_a
    k += b * k_b + a * k_a
    v += b * v_b + a * v_a
    grad += b * grad_b + a * WIDTH
    queries = _load(q, row, end, q_n, QUERIES, WIDTH, BLOCK, False)
    grads = _load(grad, row, end, grad_n, QUERIES, WIDTH, BLOCK, False)
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    delta = tl.zeros([QUERIES], tl.float32)
    last = start + (end - start - 1) // KEYS * KEYS
    for first in range(start, last, KEYS):
        peak, total, delta = _visit_keys_for_statistics(
            queries, grads, grad, q, k, v, grad_n, q_n, k_n, v_n, row, first, end, scale, peak, total, delta,
            QUERIES, KEYS, WIDTH, BLOCK, CHUNK, True,
        )  # fmt: skip
    peak, total, delta = _visit_keys_for_statistics(
        queries, grads, grad, q, k, v, grad_n, q_n, k_n, v_n, row, last, end, scale, peak, total, delta,
        QUERIES, KEYS, WIDTH, BLOCK, CHUNK, False,
    )  # fmt: skip
    share = 1.0 / total
    delta *= share
    if grad_lse is not None:
        grad_lse += (b * num_heads + a) * num_tokens + row
        of_lse = tl.load(grad_lse + tl.arange(0, QUERIES), mask=tl.arange(0, QUERIES) < end - row, other=0.0)
    else:
        of_lse = None
    sums = tl.zeros([QUERIES, BLOCK], tl.float32)
    for first in range(start, last, KEYS):
        sums = _visit_keys_for_gradient(
            queries, grads, peak, share, delta, of_lse, grad, q, k, v, grad_n, q_n, k_n, v_n, row, first, end, scale,
            sums, QUERIES, KEYS, WIDTH, BLOCK, CHUNK, True,
        )  # fmt: skip
    sums = _visit_keys_for_gradient(
        queries, grads, peak, share, delta, of_lse, grad, q, k, v, grad_n, q_n, k_n, v_n, row, last, end, scale, sums,
        QUERIES, KEYS, WIDTH, BLOCK, CHUNK, False,
    )  # fmt: skip
    head = (b * num_heads + a) * num_tokens
    target = head + row + tl.arange(0, QUERIES)
    inside = tl.arange(0, QUERIES) < end - row
    tl.store(peaks + target, peak, mask=inside)
    tl.store(shares + target, share, mask=inside)
    tl.store(deltas + target, delta, mask=inside)
    _store(grad_q + head * WIDTH, sums, row, end, WIDTH, QUERIES, WIDTH, BLOCK)


@triton.jit
def _visit_queries(
    keys, values, grad, q, k, v, peaks, shares, deltas, grad_lse, grad_n, q_n, k_n, v_n, row, first, end, scale,
    sums_k, sums_v, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add what one tile of queries gives to the gradients of the keys and the values."""
    queries = _load(q, first, end, q_n, QUERIES, WIDTH, BLOCK, WHOLE)
    rows = first + tl.arange(0, QUERIES)
    # Under an infinite peak a query that is not there gives no weight.
    peak = tl.load(peaks + rows, mask=rows < end, other=float("inf"))
    share = tl.load(shares + rows, mask=rows < end, other=0.0)
    delta = tl.load(deltas + rows, mask=rows < end, other=0.0)
    grads = _load(grad, first, end, grad_n, QUERIES, WIDTH, BLOCK, WHOLE)
    scores = _products(keys, queries, k, k_n, row, q, q_n, first, end, KEYS, QUERIES, WIDTH, BLOCK, CHUNK, True)
    weights = tl.exp2((scores - peak[None, :]) * (scale * _BITS)) * share[None, :]
    sums_v = _multiply(weights.to(grads.dtype), grads, sums_v)
    of_weights = _products(
        values, grads, v, v_n, row, grad, grad_n, first, end, KEYS, QUERIES, WIDTH, BLOCK, CHUNK, True
    )
    of_scores = of_weights - delta[None, :]
    if grad_lse is not None:
        of_scores += tl.load(grad_lse + rows, mask=rows < end, other=0.0)[None, :]
    of_scores = weights * of_scores * scale
    return _multiply(of_scores.to(queries.dtype), queries, sums_k), sums_v


@triton.jit
def keys_backward_kernel(
    grad, q, k, v, grad_k, grad_v, peaks, shares, deltas, grad_lse, tiles, num_tiles, num_heads, num_tokens, scale,
    grad_b, grad_n, q_b, q_a, q_n, k_b, k_a, k_n, v_b, v_a, v_n,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """grad_k = ds^T q and grad_v = p^T grad, with p and ds as for the queries."""
    b, a, row, start, end = _place(tiles, num_tiles, num_heads, num_tokens, KEYS)
    q += b * q_b + a * q_a
    k += b * k_b + a * k_a
    v += b * v_b + a * v_a
    grad += b * grad_b + a * WIDTH
    peaks += (b * num_heads + a) * num_tokens
    shares += (b * num_heads + a) * num_tokens
    deltas += (b * num_heads + a) * num_tokens
    if grad_lse is not None:
        grad_lse += (b * num_heads + a) * num_tokens
    keys = _load(k, row, end, k_n, KEYS, WIDTH, BLOCK, False)
    values = _load(v, row, end, v_n, KEYS, WIDTH, BLOCK, False)
    sums_k = tl.zeros([KEYS, BLOCK], tl.float32)
    sums_v = tl.zeros([KEYS, BLOCK], tl.float32)
    last = start + (end - start - 1) // QUERIES * QUERIES
    for query in range(start, last, QUERIES):
        sums_k, sums_v = _visit_queries(
            keys, values, grad, q, k, v, peaks, shares, deltas, grad_lse, grad_n, q_n, k_n, v_n, row, query, end, scale,
            sums_k, sums_v, QUERIES, KEYS, WIDTH, BLOCK, CHUNK, True,
        )  # fmt: skip
    sums_k, sums_v = _visit_queries(
        keys, values, grad, q, k, v, peaks, shares, deltas, grad_lse, grad_n, q_n, k_n, v_n, row, last, end, scale,
        sums_k, sums_v, QUERIES, KEYS, WIDTH, BLOCK, CHUNK, False,
    )  # fmt: skip
    head = (b * num_heads + a) * num_tokens * WIDTH
    _store(grad_k + head, sums_k, row, end, WIDTH, KEYS, WIDTH, BLOCK)
    _store(grad_v + head, sums_v, row, end, WIDTH, KEYS, WIDTH, BLOCK)


def why_not(q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None, return_lse: bool) -> str | None:
    if (reason := why_not_there(q)) is not None:
        return reason
    if q.dtype not in _DTYPES or any(x.dtype != q.dtype for x in (k, v)):
        return "every tensor must be of one dtype: float32, float16 or bfloat16"
    return None if 8 <= q.shape[-1] <= 128 else f"the Triton kernel takes {FOR_SHAPES}, not {q.shape[-1]}"


def forward(
    q: Tensor,  # [B, A, N, E]
    k: Tensor,  # [B, A, N, E]
    v: Tensor,  # [B, A, N, E]
    lengths: list[int] | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:  # [B, N, A E] and [B, A, N], or [B, A, 0]
    b, a, n, e = q.shape
    y = torch.empty(b, n, a * e, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, a, n if return_lse else 0, dtype=lse_dtype(q), device=q.device)
    if y.numel():
        _launch("forward", lengths, [*map(_with_close_rows, (q, k, v))], [y, lse if return_lse else None])
    return y, lse


def backward(
    grad: Tensor,  # [B, N, A E]
    grad_lse: Tensor,  # [B, A, N], or [B, A, 0]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int] | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # of q, k, v
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    if grad.numel():
        inputs = [*map(_with_close_rows, (grad, q, k, v))]
        statistics = [torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(3)]
        of_lse = grad_lse.contiguous() if return_lse else None
        _launch("queries_backward", lengths, inputs, [grads[0], *statistics, of_lse])
        _launch("keys_backward", lengths, inputs, [*grads[1:], *statistics, of_lse])
    return tuple(grads)


def _launch(name: str, lengths: list[int] | None, inputs: list[Tensor], others: list[Tensor | None]) -> None:
    q = inputs[-3]
    b, a, n, e = q.shape
    chosen = options(name, q.dtype, e, _capability(q))
    size = chosen["KEYS" if name == "keys_backward" else "QUERIES"]
    tiles = table_of_tiles(lengths, size, q)
    num_tiles = -(-n // size) if tiles is None else len(tiles)
    strides = [stride for x in inputs for stride in x.stride()[:-1]]
    with torch.cuda.device_of(q):
        KERNELS[name][(num_tiles * a * b,)](*inputs, *others, tiles, num_tiles, a, n, e**-0.5, *strides, **chosen)


KERNELS = {
    "forward": forward_kernel,
    "queries_backward": queries_backward_kernel,
    "keys_backward": keys_backward_kernel,
}


def _capability(x: Tensor) -> int:
    if triton.knobs.runtime.interpret:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return major * 10 + minor


def _with_close_rows(x: Tensor) -> Tensor:
    """`x`, or a copy where its rows are strided or far apart."""
    close = (x.shape[-1] < 2 or x.stride(-1) == 1) and x.stride(-2) < _MAX_STRIDE
    return x if close else x.contiguous()
