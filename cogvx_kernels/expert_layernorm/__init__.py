from torch import Tensor

from .._op import Op
from .._shapes import check_shape, check_value
from . import reference


def expert_layernorm(
    x: Tensor,  # [B, N, D], text rows first
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    shift: Tensor,  # [B, 2, D], for text, then for vision
    scale: Tensor,  # [B, 2, D]
    num_text: int,
    eps: float,
) -> Tensor:  # [B, N, D]
    """Normalize every token, then scale and shift text and vision each by its own modulation.

    y[b, n] = (LayerNorm(x[b, n]) * weight + bias) * (1 + scale[b, m]) + shift[b, m],
    with m = 0 for n < num_text (text) and m = 1 for the rest (vision). Mean and variance are taken in fp32 at least.

    Raises ValueError for shapes, dtypes or devices that do not agree, and for num_text outside 0 to N.
    Source: "CogVideoX" (arXiv 2408.06072), expert adaptive LayerNorm.
    """
    return _op(x, weight, bias, shift, scale, num_text, eps)


def _check(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, num_text: int, eps: float) -> None:
    name = "expert_layernorm"
    check_shape(name, "x", x, B=None, N=None, D=None)
    b, n, d = x.shape
    check_value(name, "x", list(x.shape), d > 0, "at least one channel wide")
    check_shape(name, "weight", weight, D=d)
    check_shape(name, "bias", bias, D=d)
    check_shape(name, "shift", shift, B=b, experts=2, D=d)
    check_shape(name, "scale", scale, B=b, experts=2, D=d)
    check_value(name, "num_text", num_text, 0 <= num_text <= n, f"from 0 to N = {n}")
    check_value(name, "eps", eps, eps > 0, "above 0")


_op = Op("expert_layernorm", reference, "native", "cuda", "triton", check=_check)
