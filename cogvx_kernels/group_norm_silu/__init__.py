from torch import Tensor

from .._op import Op
from .._shapes import check_shape, check_value
from . import reference


def group_norm_silu(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [C], in the dtype of x or float32
    bias: Tensor,  # [C]
    halo: Tensor | None,  # [B, C, num_halo, H, W]
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None = None,  # [B, 2, C] float32
) -> Tensor:  # [B, C, num_halo + T, H, W]
    """GroupNorm and SiLU of a chunk of video, in a new buffer behind the halo that the next convolution needs.

    y = silu(GroupNorm(x) * weight + bias), with mean and variance over each group of one chunk, T H W C / num_groups
    values. The result is [halo, y] along time; without a halo copies of y's first frame take its place. `moments`, if
    given, must be mean and variance of each channel of x, as `causal_conv3d_moments` has them: a kernel that takes them
    need not read x for its statistics.

    Raises ValueError for shapes, dtypes or devices that do not agree, and for a halo of another length than num_halo.
    """
    return _op(x, weight, bias, halo, num_groups, eps, num_halo, moments)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    halo: Tensor | None,
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None,
) -> None:
    name = "group_norm_silu"
    check_chunk(name, x, halo, num_groups, eps, num_halo)
    check_shape(name, "weight", weight, C=x.shape[1])
    check_shape(name, "bias", bias, C=x.shape[1])
    if moments is not None:
        check_shape(name, "moments", moments, B=len(x), moments=2, C=x.shape[1])


def check_chunk(name: str, x: Tensor, halo: Tensor | None, num_groups: int, eps: float, num_halo: int) -> None:
    """What this norm and the spatial one ask of a chunk and its halo."""
    check_shape(name, "x", x, B=None, C=None, T=None, H=None, W=None)
    b, c, t, h, w = x.shape
    check_value(name, "num_groups", num_groups, num_groups > 0 and c % num_groups == 0, f"a divisor of C = {c}")
    values = c // num_groups * t * h * w
    check_value(name, "x", list(x.shape), values > 1, "of more than one value a group")
    check_value(name, "eps", eps, eps > 0, "above 0")
    check_value(name, "num_halo", num_halo, num_halo >= 0, "0 or more frames")
    if halo is not None:
        check_shape(name, "halo", halo, B=b, C=c, num_halo=num_halo, H=h, W=w)


_op = Op("group_norm_silu", reference, "native", "cuda", "triton", check=_check, wide=("weight", "bias", "moments"))
