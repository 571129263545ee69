"""`causal_conv3d` in CUDA C++: an implicit matrix product on tensor cores, over channels-last memory."""

import torch
from torch import Tensor

from .. import _extension
from .._convolution import block_of, in_tiles, in_vectors, splits_of

FOR_DTYPES = (torch.bfloat16, torch.float16)
FOR_SHAPES = "kernels of up to 9 x 9 in a frame"
_LARGEST = 9


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        return f"every tensor must be {x.dtype}, as x is"
    if max(weight.shape[3:]) > _LARGEST:
        return f"the CUDA kernel is for {FOR_SHAPES}, not {list(weight.shape[3:])}"
    return _extension.why_not_cuda(x, FOR_DTYPES)


def forward(
    x: Tensor,  # [B, C, K_t - 1 + T, H, W]: the halo, then the chunk
    weight: Tensor,  # [C_out, C, K_t, K_h, K_w], odd K_h and K_w
    bias: Tensor | None,  # [C_out]
) -> Tensor:  # [B, C_out, T, H, W]
    return _convolve(x, weight, bias, 0)


def backward(
    grad: Tensor,  # [B, C_out, T, H, W]
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # of x, weight, bias
    """The gradients; that of x, the halo's included, is a convolution of grad with the weight reversed."""
    grad_x, grad_weight, grad_bias = None, None, None
    if needs[0]:
        grad_x = _convolve(grad, weight.flip(2, 3, 4).transpose(0, 1), None, weight.shape[2] - 1)
    if needs[1]:
        grad_weight = _grad_weight(grad, x, weight)
    if bias is not None and needs[2]:
        grad_bias = grad.sum((0, 2, 3, 4), dtype=torch.float32).to(bias.dtype)
    return grad_x, grad_weight, grad_bias


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, pad_t: int) -> Tensor:
    """The convolution with `pad_t` frames of zeros on both sides of x."""
    b, _, frames_in, h, w = x.shape
    c_out, _, k_t, k_h, k_w = weight.shape
    frames_out = frames_in + 2 * pad_t - k_t + 1
    shape = (b, c_out, frames_out, h, w)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    if y.numel():
        x, bias = in_vectors(x), None if bias is None else bias.contiguous()
        tiles = in_tiles(weight.flatten(3).permute(0, 2, 3, 1)[None, :, :, None])
        sizes = (b, x.shape[1], c_out, frames_in, frames_out, pad_t, h, w, k_t, k_h, k_w, block_of(c_out))
        _extension.cuda().causal_conv3d_forward(
            _extension.cuda_place(x), _extension.DTYPES[x.dtype], sizes,
            x.data_ptr(), tiles.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        )  # fmt: skip
    return y


def _grad_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    c_out, c, *taps = weight.shape
    grad, x = in_vectors(grad), in_vectors(x)
    b, num_left, t, h, w = grad.shape
    num_right = x.shape[1]
    a_split, num_splits = splits_of(grad, num_left, num_right, taps[0] * taps[1] * taps[2])
    partials = torch.empty(num_splits, num_left, *taps, num_right, dtype=torch.float32, device=x.device)
    if num_splits:
        _extension.cuda().causal_conv3d_weight(
            _extension.cuda_place(x), _extension.DTYPES[x.dtype],
            (b, num_left, num_right, t, h, w, *taps, a_split, num_splits),
            grad.data_ptr(), x.data_ptr(), partials.data_ptr(),
        )  # fmt: skip
    return partials.sum(0)[:c_out, ..., :c].permute(0, 4, 1, 2, 3).to(weight.dtype)
