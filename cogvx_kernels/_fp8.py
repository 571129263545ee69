"""A fully connected layer whose product is taken in fp8: tokens and weight in e4m3, with one scale for each row.

M tokens, D and K their width before and after. e4m3 has a sign, four bits of exponent and three behind the first, up to
448: a number is off by a 16th of itself at most, or by 2^-10 where it is that small.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import linear

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
_SMALLEST_PEAK = 1e-30  # of a row: its scale has an inverse even where every value is zero
_MULTIPLE = 16  # of which D and K must be for the product of a GPU


def fp8_linear(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [K, D] e4m3
    scale: Tensor,  # [K, 1]
    bias: Tensor | None = None,  # [K]
    gelu: bool = False,
) -> Tensor:  # [..., K], of the dtype of x
    """A fully connected layer and its activation, multiplied in fp8, for inference: y = x' (weight scale)^T + bias.

    x' is x rounded to e4m3, each row to a 448th of its largest magnitude; `rows_in_fp8` makes weight and scale. With
    `gelu` there is GELU(y) in the tanh form. On GPUs that multiply in fp8 (sm_89 and later) that is PyTorch's own
    product, whose result is rounded to bf16, where D and K are multiples of 16; elsewhere the same numbers are
    multiplied and summed in fp32.

    Raises ValueError for shapes and dtypes that do not agree, RuntimeError where a gradient is asked.
    """
    _check(x, weight, scale, bias)
    rows, x_scale = rows_in_fp8(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    if multiplies_in_fp8(x.device) and not any(size % _MULTIPLE for size in weight.shape):
        low = None if bias is None else bias.to(torch.bfloat16)
        y = torch._scaled_mm(
            rows, weight.contiguous().t(), x_scale, scale.float().t().contiguous(), low, out_dtype=torch.bfloat16
        )  # fmt: skip
    else:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = linear(rows.to(wide)[None], weight.to(wide), None)[0].mul_(x_scale).mul_(scale.to(wide).t())
        y = y if bias is None else y.add_(bias)
    y = y.to(x.dtype).reshape(*x.shape[:-1], len(weight))
    return F.gelu(y, approximate="tanh") if gelu else y


def rows_in_fp8(x: Tensor) -> tuple[Tensor, Tensor]:  # [M, D] -> [M, D] e4m3, [M, 1] float32
    """The nearest numbers in e4m3, and scales that take the largest of a row to 448.

    Where a value of a row is not finite none of the row is.
    """
    scale = (x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)).float()
    scale = scale.clamp(min=_SMALLEST_PEAK) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FP8).contiguous(), scale


@functools.cache
def multiplies_in_fp8(device: torch.device) -> bool:
    """Whether a device multiplies in e4m3, with a scale for each row."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)


def _check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    if not x.dim() or not x.is_floating_point() or x.dtype.itemsize < 2:
        what = "a tensor of rows in a floating dtype of 16 bits or more"
        raise ValueError(f"fp8_linear: x must be {what}, got {list(x.shape)} of {x.dtype}")
    if weight.dtype != FP8 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        wanted = f"[K, {x.shape[-1]}] of {FP8}"
        raise ValueError(f"fp8_linear: weight must be {wanted}, got {list(weight.shape)} of {weight.dtype}")
    if list(scale.shape) != [len(weight), 1]:
        raise ValueError(f"fp8_linear: scale must be {[len(weight), 1]}, got {list(scale.shape)}")
    if bias is not None and list(bias.shape) != [len(weight)]:
        raise ValueError(f"fp8_linear: bias must be {[len(weight)]}, got {list(bias.shape)}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, scale, bias)):
        raise RuntimeError("fp8_linear is for inference: it has no gradient")
