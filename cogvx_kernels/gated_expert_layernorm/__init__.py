from torch import Tensor

from .._op import Op
from .._shapes import check_shape, check_value
from . import reference


def gated_expert_layernorm(
    x: Tensor,  # [B, N, D], text rows first
    y: Tensor,  # [B, N, D]
    gate: Tensor,  # [B, 2, D], for text, then for vision
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    shift: Tensor,  # [B, 2, D]
    scale: Tensor,  # [B, 2, D]
    num_text: int,
    eps: float,
) -> tuple[Tensor, Tensor]:  # [B, N, D] each
    """Add a sub-layer's gated output to the residual stream, and normalize and modulate the sum for the next one.

    x_new[b, n] = x[b, n] + gate[b, m] * y[b, n], normed = expert_layernorm(x_new, weight, bias, shift, scale),
    with m = 0 for n < num_text (text) and m = 1 for the rest (vision). The norm is that of x_new as it is returned,
    rounded to its dtype.

    Raises ValueError for shapes, dtypes or devices that do not agree, and for num_text outside 0 to N.
    Source: "CogVideoX" (arXiv 2408.06072), expert adaptive LayerNorm.
    """
    return _op(x, y, gate, weight, bias, shift, scale, num_text, eps)


def _check(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    num_text: int,
    eps: float,
) -> None:
    name = "gated_expert_layernorm"
    check_shape(name, "x", x, B=None, N=None, D=None)
    b, n, d = x.shape
    check_value(name, "x", list(x.shape), d > 0, "at least one channel wide")
    check_shape(name, "y", y, B=b, N=n, D=d)
    for argument, value in (("weight", weight), ("bias", bias)):
        check_shape(name, argument, value, D=d)
    for argument, value in (("gate", gate), ("shift", shift), ("scale", scale)):
        check_shape(name, argument, value, B=b, experts=2, D=d)
    check_value(name, "num_text", num_text, 0 <= num_text <= n, f"from 0 to N = {n}")
    check_value(name, "eps", eps, eps > 0, "above 0")


_op = Op("gated_expert_layernorm", reference, "native", "cuda", "triton", check=_check)
