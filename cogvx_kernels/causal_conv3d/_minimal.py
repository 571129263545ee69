"""`causal_conv3d` on CPUs by oneDNN, with 4 products in place of 6: minimal filtering in time.

Two results of three taps over frames d0 to d3, every product a 2D convolution, in time F(2, 3):

    m1 = w0 (d0 - d2), m2 = (w0 + w1 + w2) / 2 (d1 + d2), m3 = (w0 - w1 + w2) / 2 (d2 - d1), m4 = w2 (d1 - d3),
    y0 = m1 + m2 + m3, y1 = m2 - m3 - m4.

y0 takes nothing from d3, so it stays causal. Where the halo repeats the first frame, as it does before the first chunk
of a clip, y[0] = (w0 + w1 + w2) x[0] is one product in place of three.

Source: S. Winograd, "Arithmetic complexity of computations" (1980); A. Lavin, S. Gray, "Fast algorithms for
convolutional neural networks" (arXiv 1509.09308).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Smaller frames do not pay for the sums of weights, fewer channels (C C_out / (C + C_out)) not for the sums of frames.
_LEAST_PIXELS, _LEAST_CHANNELS = 512, 32
_PIXELS_AT_ONCE = 2**16  # of pairs: single frames are slower in oneDNN, and the fewer, the less is held twice


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> str | None:
    return None if x.device.type == "cpu" else f"oneDNN convolves on CPUs, not on {x.device}"


def forward(
    x: Tensor,  # [B, C, K_t - 1 + T, H, W]: the halo, then the chunk
    weight: Tensor,  # [C_out, C, K_t, K_h, K_w], odd K_h and K_w
    bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, T, H, W]
) -> Tensor:  # [B, C_out, T, H, W]
    y = _convolve(x, weight, bias) if _pays(x, weight) else _conv(x, weight, bias)
    return y if residual is None else y.add_(residual)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    b, _, num_frames, h, w = x.shape
    num_frames -= 2
    shape = (b, len(weight), num_frames, h, w)
    y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last_3d)
    w0, w1, w2 = weight.to(torch.promote_types(weight.dtype, torch.float32)).unbind(2)
    half = (w0 + w2) / 2
    taps = [part.to(weight.dtype) for part in (w0, half + w1 / 2, half - w1 / 2, w2)]
    start = 0
    if torch.equal(x[:, :, 0], x[:, :, 1]) and torch.equal(x[:, :, 1], x[:, :, 2]):
        y[:, :, 0] = _conv(x[:, :, 2], (w0 + w1 + w2).to(weight.dtype), bias)
        start = 1
    del w0, w1, w2, half
    num_pairs = (num_frames - start) // 2
    num_parts = min(num_pairs, -(-num_pairs * b * h * w // _PIXELS_AT_ONCE))
    end = start
    for i in range(num_parts):
        t, end = end, start + 2 * (num_pairs * (i + 1) // num_parts)
        _pairs(x[:, :, t : end + 2], taps, bias, y[:, :, t:end])
    if end < num_frames:
        y[:, :, end:] = _conv(x[:, :, end:], weight, bias)
    return y


def _pays(x: Tensor, weight: Tensor) -> bool:
    c_out, c, k_t = weight.shape[:3]
    return (
        k_t == 3
        and c * c_out >= _LEAST_CHANNELS * (c + c_out)
        and x.shape[0] * x.shape[3] * x.shape[4] >= max(1, _LEAST_PIXELS)
        and x.dtype != torch.float16  # d1 + d2 might overflow
        and x.is_contiguous(memory_format=torch.channels_last_3d)
    )


def _pairs(x: Tensor, taps: list[Tensor], bias: Tensor | None, y: Tensor) -> None:
    """Write the frames of y, an even number of them, from two frames more of x."""
    d0, d1, d2, d3 = (x[:, :, i : x.shape[2] - 3 + i : 2] for i in range(4))
    first, second = y[:, :, ::2], y[:, :, 1::2]
    m2 = _conv_frames(d1 + d2, taps[1], bias)
    m3 = _conv_frames(d2 - d1, taps[2], None)
    torch.add(m2, m3, out=first)
    m2 -= m3
    del m3
    first += _conv_frames(d0 - d2, taps[0], None)
    torch.sub(m2, _conv_frames(d1 - d3, taps[3], None), out=second)


def _conv_frames(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [B, C, T, H, W], [C_out, C, K_h, K_w]
    return _conv(x.transpose(1, 2).flatten(0, 1), weight, bias).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = (weight.shape[-2] // 2, weight.shape[-1] // 2)
    return F.conv2d(x, weight, bias, 1, padding) if x.dim() == 4 else F.conv3d(x, weight, bias, 1, (0, *padding))
