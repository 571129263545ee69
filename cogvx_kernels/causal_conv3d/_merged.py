"""`causal_conv3d` on CPUs, by oneDNN; where the halo repeats the first frame, its taps are merged.

Before the first chunk of a clip the halo holds copies of the first frame. There the taps of equal frames add up:
y[0] = (w0 + w1 + w2) x[0], y[1] = (w0 + w1) x[0] + w2 x[1], one and two taps in place of three and three. Of a chunk of
9 frames that is 1/9 of all products, of 3 frames 1/3, of an image 2/3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import _memory_format

_LEAST_PIXELS = 512  # of a frame; for fewer, adding up weights takes longer than it saves
_PIXELS_AT_ONCE = 2**14  # what follows is computed in parts of about this many, so that little of it is held twice


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return None if x.device.type == "cpu" else f"merged taps are for CPUs, not for {x.device}"


def forward(
    x: Tensor,  # [B, C, K_t - 1 + T, H, W]: the halo, then the chunk
    weight: Tensor,  # [C_out, C, K_t, K_h, K_w], odd K_h and K_w
    bias: Tensor | None,  # [C_out]
) -> Tensor:  # [B, C_out, T, H, W]
    num_halo = weight.shape[2] - 1
    chunk = x[:, :, num_halo:]
    b, _, num_frames, h, w = chunk.shape
    if b * h * w < _LEAST_PIXELS or not _halo_is_first_frame(x, num_halo):
        return _conv(x, weight, bias)
    y = torch.empty((b, len(weight), num_frames, h, w), dtype=x.dtype, memory_format=_memory_format(x))
    merged = weight[:, :, 0].to(torch.promote_types(weight.dtype, torch.float32))
    for t in reversed(range(num_halo)):
        merged = merged + weight[:, :, num_halo - t]
        if t < num_frames:  # torch sends a short conv3d to a slow loop of its own, so taps in time become channels
            frames = torch.cat(chunk[:, :, : t + 1].unbind(2), dim=1)
            taps = torch.cat([merged.to(weight.dtype), *weight[:, :, num_halo - t + 1 :].unbind(2)], dim=1)
            y[:, :, t] = _conv(frames, taps, bias)
    step = max(2, _PIXELS_AT_ONCE // (h * w))
    for t in range(num_halo, num_frames, step):
        y[:, :, t : t + step] = _conv(chunk[:, :, t - num_halo : t + step], weight, bias)
    return y


def _halo_is_first_frame(x: Tensor, num_halo: int) -> bool:
    equal = (torch.equal(x[:, :, i], x[:, :, i + 1]) for i in range(num_halo))
    return num_halo > 0 and all(equal)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = (weight.shape[-2] // 2, weight.shape[-1] // 2)
    return F.conv2d(x, weight, bias, 1, padding) if x.dim() == 4 else F.conv3d(x, weight, bias, 1, (0, *padding))
