from torch import Tensor

from .._op import Op
from .._shapes import check_shape, check_value
from . import reference


def qk_norm_rope(
    qkv: Tensor,  # [B, N, 3 A E]: all of q, then all of k, then all of v; text rows first
    q_weight: Tensor,  # [E]
    q_bias: Tensor,  # [E]
    k_weight: Tensor,  # [E]
    k_bias: Tensor,  # [E]
    cos: Tensor | None,  # [N - num_text, E], or None without positions
    sin: Tensor | None,  # [N - num_text, E]
    num_text: int,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # q, k, v: [B, A, N, E] each
    """From the fused projection to q, k and v as attention reads them: normalized per head, vision rotated.

    q = LayerNorm(q) * q_weight + q_bias over each head's E channels, k likewise. In vision rows each interleaved pair
    (x[2i], x[2i+1]) then turns into (x[2i] cos - x[2i+1] sin, x[2i+1] cos + x[2i] sin); cos and sin hold each angle
    twice. Their dtype is that of the rotation: in fp32 nothing is rounded before the end, in the 16 bits of qkv x, each
    product and each sum are rounded to these. Text rows are not rotated; v is rearranged only.

    Raises ValueError for shapes, dtypes or devices that do not agree, one of cos and sin alone, or an odd E with them.
    Source: "RoFormer" (arXiv 2104.09864); "CogVideoX" (arXiv 2408.06072) for 3D positions.
    """
    return _op(qkv, q_weight, q_bias, k_weight, k_bias, cos, sin, num_text, num_heads, eps)


def _check(
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
) -> None:
    name = "qk_norm_rope"
    check_shape(name, "qkv", qkv, B=None, N=None, width=None)
    n, width = qkv.shape[1:]
    check_value(name, "num_heads", num_heads, num_heads > 0, "at least 1")
    fits = width > 0 and width % (3 * num_heads) == 0
    check_value(name, "qkv", list(qkv.shape), fits, f"a multiple of 3 num_heads = {3 * num_heads} wide")
    e = width // (3 * num_heads)
    check_shape(name, "q_weight", q_weight, E=e)
    check_shape(name, "q_bias", q_bias, E=e)
    check_shape(name, "k_weight", k_weight, E=e)
    check_shape(name, "k_bias", k_bias, E=e)
    check_value(name, "num_text", num_text, 0 <= num_text <= n, f"from 0 to N = {n}")
    check_value(name, "eps", eps, eps > 0, "above 0")
    if cos is None or sin is None:
        if cos is not None or sin is not None:
            raise ValueError(f"{name}: {'cos' if cos is None else 'sin'} must be given with the other, got None")
        return
    check_value(name, "num_heads", num_heads, e % 2 == 0, f"such that heads have an even width to rotate (here {e})")
    check_shape(name, "cos", cos, vision=n - num_text, E=e)
    check_shape(name, "sin", sin, vision=n - num_text, E=e)


_op = Op("qk_norm_rope", reference, "native", "cuda", "triton", check=_check, wide=("cos", "sin"))
