"""`causal_conv3d` in CUDA C++: an implicit matrix product on tensor cores, over channels-last memory."""

import torch
from torch import Tensor

from .. import _extension
from .._convolution import FOR_DTYPES, FOR_SHAPES, convolve_causally, weight_gradient
from .._convolution import scratch_causally as scratch
from .._convolution import why_not_causally as why_not

__all__ = ["FOR_DTYPES", "FOR_SHAPES", "backward", "forward", "scratch", "why_not"]


def forward(
    x: Tensor,  # [B, C, K_t - 1 + T, H, W]: the halo, then the chunk
    weight: Tensor,  # [C_out, C, K_t, K_h, K_w], odd K_h and K_w
    bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, T, H, W]
) -> Tensor:  # [B, C_out, T, H, W]
    return convolve_causally(_extension.cuda().causal_conv3d_forward, x, weight, bias, residual)


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
        kernel, reversed_weight = _extension.cuda().causal_conv3d_forward, weight.flip(2, 3, 4).transpose(0, 1)
        grad_x = convolve_causally(kernel, grad, reversed_weight, None, None, weight.shape[2] - 1)
    if needs[1]:
        kernel, (k_t, k_h, k_w) = _extension.cuda().causal_conv3d_weight, weight.shape[2:]
        grad_weight = weight_gradient(kernel, grad, x, (k_t, k_h, k_w), (k_h // 2, k_w // 2))
        grad_weight = grad_weight.permute(0, 4, 1, 2, 3).to(weight.dtype)
    if bias is not None and needs[2]:
        grad_bias = grad.sum((0, 2, 3, 4), dtype=torch.float32).to(bias.dtype)
    return grad_x, grad_weight, grad_bias, grad
