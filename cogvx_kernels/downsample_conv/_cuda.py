"""`downsample_conv` in CUDA C++: on tensor cores, over channels-last memory, the four phases of x summed."""

import torch
from torch import Tensor

from .. import _extension
from .._convolution import convolve, filled_up, in_tiles_gathered, in_tiles_spread, weight_gradient

FOR_DTYPES = (torch.bfloat16, torch.float16)
_TAPS, _PADS = (1, 3, 3), (0, 0, 0)


def why_not(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if any(t.dtype != x.dtype for t in (weight, bias)):
        return f"every tensor must be {x.dtype}, as x is"
    return _extension.why_not_cuda(x, FOR_DTYPES)


def forward(
    x: Tensor,  # [B, C, T, H, W], H and W at least 2
    weight: Tensor,  # [C_out, C, 3, 3]
    bias: Tensor,  # [C_out]
) -> Tensor:  # [B, C_out, T, H / 2, W / 2], rounded down
    b, _, t, h, w = x.shape
    shape = (b, len(weight), t, h // 2, w // 2)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    if y.numel():
        tiles = in_tiles_gathered(weight, pad=0)
        convolve(_extension.cuda().downsample_conv_forward, x, tiles, y, _TAPS, _PADS, bias)
    return y


def scratch(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    return [in_tiles_gathered(weight, pad=0), *filled_up(x)] if x.numel() and len(weight) else []


def backward(
    grad: Tensor,  # [B, C_out, T, H / 2, W / 2]
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # of x, weight, bias
    grad_x, grad_weight, grad_bias = None, None, None
    if needs[0]:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        if x.numel():
            tiles = in_tiles_spread(weight.transpose(0, 1), pad=0)
            convolve(_extension.cuda().downsample_conv_input, grad, tiles, grad_x, _TAPS, _PADS)
    if needs[1]:
        kernel = _extension.cuda().downsample_conv_weight
        grad_weight = weight_gradient(kernel, grad, x, _TAPS, _PADS[1:], step=2)
        grad_weight = grad_weight[:, 0].permute(0, 3, 1, 2).to(weight.dtype)
    if needs[2]:
        grad_bias = grad.sum((0, 2, 3, 4), dtype=torch.float32).to(bias.dtype)
    return grad_x, grad_weight, grad_bias
