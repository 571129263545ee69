"""Between pixels as files hold them and videos as models take them."""

import numpy as np
import torch
from torch import Tensor


def to_tensor(frames: np.ndarray) -> Tensor:
    """Frames, uint8 [T, H, W, 3] or [B, T, H, W, 3], as a video [B, 3, T, H, W] in fp32, -1 to 1."""
    video = torch.from_numpy(frames if frames.ndim == 5 else frames[None])
    return video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def to_frames(video: Tensor) -> np.ndarray:
    """A video [B, 3, T, H, W], nominally -1 to 1, as frames, uint8 [B, T, H, W, 3]."""
    return to_levels(video).cpu().numpy()


def to_levels(video: Tensor) -> Tensor:
    """The same as a tensor, where the video is."""
    levels = ((video.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 4, 1).contiguous()
