from torch import Tensor

from .._op import Op
from .._shapes import check_shape, check_value
from . import reference


def downsample_conv(
    x: Tensor,  # [B, C, T, H, W], H and W at least 2
    weight: Tensor,  # [C_out, C, 3, 3]
    bias: Tensor,  # [C_out]
) -> Tensor:  # [B, C_out, T, H / 2, W / 2], rounded down
    """Half the height and width, by a 3x3 convolution of every frame with step 2.

    y[t, r, s] = sum over k, l of x[t, 2r + k, 2s + l] weight[:, :, k, l] + bias, with one row of zeros below and one
    column to the right of an even number of them; there is no padding above and to the left.

    Raises ValueError for shapes, dtypes or devices that do not agree, and for frames of less than 2 x 2 pixels.
    """
    return _op(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    name = "downsample_conv"
    check_shape(name, "x", x, B=None, C=None, T=None, H=None, W=None)
    filled = x.shape[1] > 0 and x.shape[2] > 0 and x.shape[3] > 1 and x.shape[4] > 1
    check_value(name, "x", list(x.shape), filled, "of at least one channel, one frame and 2 x 2 pixels")
    check_shape(name, "weight", weight, C_out=None, C=x.shape[1], K_h=3, K_w=3)
    check_value(name, "weight", list(weight.shape), weight.shape[0] > 0, "of at least one output channel")
    check_shape(name, "bias", bias, C_out=weight.shape[0])


_op = Op("downsample_conv", reference, "minimal", "cuda", "triton", check=_check)
