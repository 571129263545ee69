"""`int8_joint_attention` in CUDA C++, on the tensor cores, for tensors of 16 bits."""

import torch
from torch import Tensor

from .. import _extension
from .._extension import DTYPES, by_head, cuda_place, heads, with_aligned_rows
from .reference import KEYS, QUERIES, mean_of_tokens

FOR_DTYPES = (torch.bfloat16, torch.float16)
FOR_SHAPES = "head widths that are multiples of 8, up to 128"


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if not q.dtype is k.dtype is v.dtype:
        return f"every tensor must be {q.dtype}, as q is"
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"the CUDA kernel takes {FOR_SHAPES}, not {q.shape[-1]}"
    return _extension.why_not_cuda(q, FOR_DTYPES)


def forward(
    q: Tensor,  # [B, A, N, E]
    k: Tensor,  # [B, A, N, E]
    v: Tensor,  # [B, A, N, E]
) -> Tensor:  # [B, N, A E]
    b, a, n, e = q.shape
    y = torch.empty(b, n, a * e, dtype=q.dtype, device=q.device)
    if not y.numel():
        return y
    mean = mean_of_tokens(k).contiguous()
    q, k, v = map(with_aligned_rows, (q, k, v))
    q8, q_scales = _rounded(q, QUERIES)
    k8, k_scales = _rounded(k, KEYS)
    _extension.cuda().int8_joint_attention_forward(
        cuda_place(q), DTYPES[q.dtype], (b, a, n, e), heads(q), heads(k), heads(v), heads(by_head(y, a)),
        mean.data_ptr(), (q8.data_ptr(), q_scales.data_ptr()), (k8.data_ptr(), k_scales.data_ptr()),
    )  # fmt: skip
    return y


def scratch(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Queries and keys in 8 bits with their scales, and the keys' mean."""
    return [mean_of_tokens(k), *_rounded(q, QUERIES), *_rounded(k, KEYS)] if q.numel() else []


def _rounded(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Memory for x in int8, and for the scale of each group of `size` tokens."""
    b, a, n, e = x.shape
    row = _extension.cuda().int8_joint_attention_row_bytes(e)
    integers = torch.empty(b, a, n, row, dtype=torch.int8, device=x.device)
    return integers, torch.empty(b, a, -(-n // size), dtype=torch.float32, device=x.device)
