"""Causal 3D convolution, in plain PyTorch: the meaning of `causal_conv3d`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor,  # [B, C, K_t - 1 + T, H, W]: the halo, then the chunk
    weight: Tensor,  # [C_out, C, K_t, K_h, K_w], odd K_h and K_w
    bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, T, H, W]
) -> Tensor:  # [B, C_out, T, H, W]
    y = F.conv3d(x, weight, bias, padding=(0, weight.shape[3] // 2, weight.shape[4] // 2))
    return y if residual is None else y.add_(residual)  # in place: no convolution's gradient needs its result


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # of x, weight, bias, residual
    padding = [0, weight.shape[3] // 2, weight.shape[4] // 2]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, x, weight, None if bias is None else list(bias.shape), [1, 1, 1], padding, [1, 1, 1], False, [0, 0, 0], 1,
        [True, True, bias is not None],
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias, grad
