"""`causal_conv3d` in CUDA C++: an implicit matrix product on tensor cores, over channels-last memory."""

import torch
from torch import Tensor

from .. import _extension
from .._convolution import convolve, in_tiles, weight_gradient

FOR_DTYPES = (torch.bfloat16, torch.float16)
FOR_SHAPES = "kernels of up to 9 x 9 in a frame"
_LARGEST = 9


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> str | None:
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias, residual)):
        return f"every tensor must be {x.dtype}, as x is"
    if max(weight.shape[3:]) > _LARGEST:
        return f"the CUDA kernel is for {FOR_SHAPES}, not {list(weight.shape[3:])}"
    return _extension.why_not_cuda(x, FOR_DTYPES)


def forward(
    x: Tensor,  # [B, C, K_t - 1 + T, H, W]: the halo, then the chunk
    weight: Tensor,  # [C_out, C, K_t, K_h, K_w], odd K_h and K_w
    bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, T, H, W]
) -> Tensor:  # [B, C_out, T, H, W]
    return _convolve(x, weight, bias, residual, 0)


def backward(
    grad: Tensor,  # [B, C_out, T, H, W]
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:  # of x, weight, bias, residual
    """The gradients; that of x, the halo's included, is a convolution of grad with the weight reversed."""
    grad_x, grad_weight, grad_bias = None, None, None
    if needs[0]:
        grad_x = _convolve(grad, weight.flip(2, 3, 4).transpose(0, 1), None, None, weight.shape[2] - 1)
    if needs[1]:
        kernel, (k_t, k_h, k_w) = _extension.cuda().causal_conv3d_weight, weight.shape[2:]
        grad_weight = weight_gradient(kernel, grad, x, (k_t, k_h, k_w), (k_h // 2, k_w // 2))
        grad_weight = grad_weight.permute(0, 4, 1, 2, 3).to(weight.dtype)
    if bias is not None and needs[2]:
        grad_bias = grad.sum((0, 2, 3, 4), dtype=torch.float32).to(bias.dtype)
    return grad_x, grad_weight, grad_bias, grad


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, pad_t: int) -> Tensor:
    """The convolution with `pad_t` frames of zeros on both sides of x."""
    b, _, frames_in, h, w = x.shape
    c_out, _, k_t, k_h, k_w = weight.shape
    shape = (b, c_out, frames_in + 2 * pad_t - k_t + 1, h, w)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    if y.numel():
        kernel, pads = _extension.cuda().causal_conv3d_forward, (pad_t, k_h // 2, k_w // 2)
        convolve(kernel, x, in_tiles(weight.flatten(3)), y, (k_t, k_h, k_w), pads, bias, residual)
    return y
