from torch import Tensor

from .._op import Op
from .._shapes import check_shape, check_value
from . import reference


def upsample_conv(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [C_out, C, 3, 3]
    bias: Tensor,  # [C_out]
    double_time: bool,
) -> Tensor:  # [B, C_out, T', 2H, 2W]
    """Twice the height and width, optionally twice the frames, then a 3x3 convolution of every frame.

    y[t] = conv2d(nearest(x[t], 2), weight) + bias, space padded with zeros. With `double_time` every frame comes
    twice (T' = 2T); in an odd number of frames the first comes once (T' = 2T - 1).

    Raises ValueError for shapes, dtypes or devices that do not agree.
    """
    return _op(x, weight, bias, double_time)


def _check(x: Tensor, weight: Tensor, bias: Tensor, double_time: bool) -> None:
    name = "upsample_conv"
    check_shape(name, "x", x, B=None, C=None, T=None, H=None, W=None)
    filled = x.shape[1] > 0 and x.shape[2] > 0 and x.shape[3] > 0 and x.shape[4] > 0
    check_value(name, "x", list(x.shape), filled, "of at least one channel, frame and pixel")
    check_shape(name, "weight", weight, C_out=None, C=x.shape[1], K_h=3, K_w=3)
    check_value(name, "weight", list(weight.shape), weight.shape[0] > 0, "of at least one output channel")
    check_shape(name, "bias", bias, C_out=weight.shape[0])


_op = Op("upsample_conv", reference, "minimal", "cuda", "triton", check=_check)
