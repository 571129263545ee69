from torch import Tensor

from .._op import Op
from .._shapes import check_shape, check_value
from ..group_norm_silu import check_chunk
from . import reference


def spatial_norm_silu(
    x: Tensor,  # [B, C, T, H, W]
    z: Tensor,  # [B, C_z, T_z, H_z, W_z]
    weight: Tensor,  # [C], of the GroupNorm, in the dtype of x or float32
    bias: Tensor,  # [C]
    weight_y: Tensor,  # [C, C_z], of the 1x1x1 convolution that scales
    bias_y: Tensor,  # [C]
    weight_b: Tensor,  # [C, C_z], of the 1x1x1 convolution that shifts
    bias_b: Tensor,  # [C]
    halo: Tensor | None,  # [B, C, num_halo, H, W]
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None = None,  # [B, 2, C] float32
) -> Tensor:  # [B, C, num_halo + T, H, W]
    """The decoder's norm: GroupNorm scaled and shifted at every pixel by the latent, and SiLU, behind a halo.

    y = silu(GroupNorm(x) * resize(weight_y z + bias_y) + resize(weight_b z + bias_b)), resized by nearest to x's size
    T, H, W; of an odd T above one the first frame takes the latent's first and the rest share the others. Statistics,
    moments and halo are as in `group_norm_silu`.

    Raises ValueError for shapes, dtypes or devices that do not agree, and for a halo of another length than num_halo.
    Source: "MoVQ" (arXiv 2209.09002) for the norm, "CogVideoX" (arXiv 2408.06072) for its use in time.
    """
    return _op(x, z, weight, bias, weight_y, bias_y, weight_b, bias_b, halo, num_groups, eps, num_halo, moments)


def _check(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_y: Tensor,
    bias_y: Tensor,
    weight_b: Tensor,
    bias_b: Tensor,
    halo: Tensor | None,
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None,  # [B, 2, C]
) -> None:
    name = "spatial_norm_silu"
    check_chunk(name, x, halo, num_groups, eps, num_halo)
    b, c, t = x.shape[:3]
    check_shape(name, "z", z, B=b, C_z=None, T_z=None, H_z=None, W_z=None)
    c_z, t_z, h_z, w_z = z.shape[1:]
    check_value(name, "z", list(z.shape), c_z > 0 and h_z > 0 and w_z > 0, "of at least one channel and pixel")
    least = 2 if t > 1 and t % 2 == 1 else 1
    check_value(name, "z", list(z.shape), t_z >= least, f"at least {least} frames long for T = {t}")
    check_shape(name, "weight", weight, C=c)
    check_shape(name, "bias", bias, C=c)
    check_shape(name, "weight_y", weight_y, C=c, C_z=c_z)
    check_shape(name, "bias_y", bias_y, C=c)
    check_shape(name, "weight_b", weight_b, C=c, C_z=c_z)
    check_shape(name, "bias_b", bias_b, C=c)
    if moments is not None:
        check_shape(name, "moments", moments, B=b, moments=2, C=c)


_op = Op("spatial_norm_silu", reference, "native", "cuda", "triton", check=_check, wide=("weight", "bias", "moments"))
