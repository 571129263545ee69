"""How well a VAE reconstructs clips that it never saw: peak signal-to-noise ratio in dB.

B batch, C channels, T frames, H W height and width. Clips are uint8 [T, H, W, 3], videos [B, 3, T, H, W] in [-1, 1].
"""

from dataclasses import dataclass
from itertools import cycle, islice
from statistics import fmean

import numpy as np
import torch
from torch import nn

from ..data.pixels import to_frames, to_tensor
from ..data.shapes import HELD_OUT_SCENES, SIZES, Scene, render


@dataclass(frozen=True)
class Reconstruction:
    """PSNR of each clip in dB, after rounding to uint8."""

    psnr: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.psnr)


def evaluate_reconstruction(vae: nn.Module, num_clips: int = 96, seed: int = 0, batch_size: int = 8) -> Reconstruction:
    """The PSNR of clips of held-out combinations through the VAE: mode of the posterior, decoded, rounded to uint8.

    Raises:
        ValueError: where `num_clips` or `batch_size` is not positive.
    """
    for name, number in (("num_clips", num_clips), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} is {number}, which is less than 1")
    clips = held_out_clips(num_clips, seed)
    return Reconstruction(
        tuple(
            psnr(clip, again)
            for some in (clips[i : i + batch_size] for i in range(0, num_clips, batch_size))
            for clip, again in zip(some, reconstruct(vae, some), strict=True)
        )
    )


def held_out_clips(num_clips: int, seed: int = 0) -> list[np.ndarray]:
    """Clips of the held-out combinations in turn, the sizes in turn beside them; clip i depends on seed and i alone."""
    scenes = islice(cycle(HELD_OUT_SCENES), num_clips)
    sized = (
        Scene(scene.colour, scene.shape, scene.motion, scene.background, SIZES[(i + i // len(HELD_OUT_SCENES)) % 3])
        for i, scene in enumerate(scenes)
    )
    return [render(scene, np.random.default_rng([seed, i])) for i, scene in enumerate(sized)]


@torch.inference_mode()
def reconstruct(vae: nn.Module, clips: list[np.ndarray]) -> list[np.ndarray]:
    """The clips, uint8 [T, H, W, 3] all of one size, through the VAE and back."""
    weight = next(vae.parameters())
    video = to_tensor(np.stack(clips)).to(weight.device, weight.dtype)
    return list(to_frames(vae.decode(vae.encode(video).mode())))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays in dB, 10 log10(255^2 / mean squared difference).

    Equal arrays count as one level off in one value, so that the ratio is finite.
    """
    difference = np.square(a.astype(np.float64) - b.astype(np.float64)).sum()
    return float(10.0 * np.log10(255.0**2 * a.size / max(difference, 1.0)))
