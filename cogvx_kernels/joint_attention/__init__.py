from torch import Tensor

from .._op import Op
from .._shapes import check_shape, check_value
from . import reference


def joint_attention(
    q: Tensor,  # [B, A, N, E]
    k: Tensor,  # [B, A, N, E]
    v: Tensor,  # [B, A, N, E]
    lengths: list[int] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # [B, N, A E]; with lse [B, A, N] float32
    """Full attention over text and vision together; with `lengths` over samples packed one after another.

    y = softmax(q k^T / sqrt(E)) v per head, heads side by side in the result. With `lengths` (in tokens; B is 1 and
    they sum to N) the tokens of one sample see that sample alone.

    With `return_lse` there is lse beside y: for each query the natural logarithm of the sum of e^(q k^T / sqrt(E)) over
    the keys that it sees, in float32 (float64 for float64). It weighs attention over some of the keys against attention
    over others: of two such results the whole is y = e^(lse_1 - lse) y_1 + e^(lse_2 - lse) y_2 with lse =
    logaddexp(lse_1, lse_2), as where each process holds an equal part of the tokens. Both results carry gradients.
    The plain PyTorch backend then writes all scores to memory.

    Raises ValueError for shapes, dtypes or devices that do not agree, and for lengths that do not add up.
    """
    y, lse = _op(q, k, v, lengths, return_lse)
    return (y, lse) if return_lse else y


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None, return_lse: bool) -> None:
    name = "joint_attention"
    check_shape(name, "q", q, B=None, A=None, N=None, E=None)
    b, a, n, e = q.shape
    check_value(name, "q", list(q.shape), a > 0 and e > 0, "of at least one head and one channel")
    check_shape(name, "k", k, B=b, A=a, N=n, E=e)
    check_shape(name, "v", v, B=b, A=a, N=n, E=e)
    if lengths is not None:
        check_value(name, "lengths", lengths, b == 1, f"None unless B is 1 (here {b})")
        check_value(name, "lengths", lengths, all(x > 0 for x in lengths), "all above 0")
        check_value(name, "lengths", lengths, sum(lengths) == n, f"of sum N = {n}")


_op = Op("joint_attention", reference, "native", "cuda", "triton", check=_check)
