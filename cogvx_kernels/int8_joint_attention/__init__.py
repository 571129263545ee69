from torch import Tensor

from .._op import Op
from .._shapes import check_shape, check_value
from . import reference


def int8_joint_attention(
    q: Tensor,  # [B, A, N, E]
    k: Tensor,  # [B, A, N, E]
    v: Tensor,  # [B, A, N, E]
) -> Tensor:  # [B, N, A E]
    """Full attention over text and vision together, for inference, with the scores computed in int8.

    y = softmax(q' k'^T / sqrt(E)) v per head, heads side by side in the result. k' is k less its mean over the tokens
    of a head, which the softmax does not see, and q' and k' are rounded to a 127th of the largest magnitude among 128
    queries or 64 keys that follow one another. Their products are summed in int32, the softmax is taken in fp32, and
    its weights are rounded to the dtype of v.

    On normal data, and with a mean of any size in each channel of k, the result is within 2e-2 of exact attention
    (norm of the difference over the norm) and at a cosine of at least 0.999 to it. Every backend is as close to the
    formula above as plain PyTorch, or closer than twice the precision of the dtype times the largest value.

    Raises ValueError for shapes, dtypes or devices that do not agree; RuntimeError where a gradient is asked.
    Source: "SageAttention" (arXiv 2410.02367) and "SageAttention2" (arXiv 2411.10958).
    """
    return _op(q, k, v)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    name = "int8_joint_attention"
    check_shape(name, "q", q, B=None, A=None, N=None, E=None)
    b, a, n, e = q.shape
    check_value(name, "q", list(q.shape), a > 0 and e > 0, "of at least one head and one channel")
    check_shape(name, "k", k, B=b, A=a, N=n, E=e)
    check_shape(name, "v", v, B=b, A=a, N=n, E=e)


_op = Op("int8_joint_attention", reference, "cuda", "triton", check=_check, differentiable=False)
