from torch import Tensor

from .._op import Op
from .._shapes import check_shape, check_value
from . import reference


def causal_conv3d(
    x: Tensor,  # [B, C, K_t - 1 + T, H, W]: the halo, then the chunk
    weight: Tensor,  # [C_out, C, K_t, K_h, K_w], odd K_h and K_w
    bias: Tensor | None,  # [C_out]
    residual: Tensor | None = None,  # [B, C_out, T, H, W]
) -> Tensor:  # [B, C_out, T, H, W]
    """Convolve a chunk of video in which a frame sees itself and the K_t - 1 frames before it, never a later one.

    y[t] = sum over k of conv2d(x[t + k], weight[:, :, k]) + bias + residual[t], space padded with zeros. The halo in
    front of the chunk holds the last K_t - 1 input frames of the chunk before, or copies of the first frame.

    Raises ValueError for shapes, dtypes or devices that do not agree, and for a buffer shorter than K_t frames.
    """
    return _op(x, weight, bias, residual)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    check("causal_conv3d", x, weight, bias, residual)


def check(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """What this convolution and the one with moments ask of their arguments."""
    check_shape(name, "x", x, B=None, C=None, frames=None, H=None, W=None)
    check_shape(name, "weight", weight, C_out=None, C=x.shape[1], K_t=None, K_h=None, K_w=None)
    c_out, c, k_t, k_h, k_w = weight.shape
    legal = c_out > 0 and c > 0 and k_t > 0 and k_h % 2 == 1 and k_w % 2 == 1
    check_value(name, "weight", list(weight.shape), legal, "not empty, with odd K_h and K_w")
    legal = x.shape[2] >= k_t and x.shape[3] > 0 and x.shape[4] > 0
    check_value(name, "x", list(x.shape), legal, f"at least K_t = {k_t} frames (halo and chunk) of at least one pixel")
    if bias is not None:
        check_shape(name, "bias", bias, C_out=c_out)
    if residual is not None:
        b, _, frames, h, w = x.shape
        check_shape(name, "residual", residual, B=b, C_out=c_out, T=frames - k_t + 1, H=h, W=w)


_op = Op("causal_conv3d", reference, "minimal", "cuda", "triton", check=_check, added=("residual",))
