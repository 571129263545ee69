"""Videos longer than a model was trained on: a denoiser that sees overlapping windows of the frames.

Source: "MultiDiffusion" (arXiv 2302.08113) for averaging predictions in every step; the weights rise and fall linearly
over a window, so that a frame near a window's edge follows the window that has it nearer to its middle.
"""

import torch
from torch import Tensor

from .samplers import Denoiser


def window_starts(
    num_frames: int,  # latent frames
    length: int,
    overlap: int,
) -> list[int]:
    """Where windows of `length` frames start that cover all frames and share at least `overlap` with their neighbours.

    They lie as evenly as whole frames allow, the last one ending with the last frame.

    Raises: ValueError for an overlap that is not from 0 to length - 1, or a window without frames.
    """
    for name, value, low in (("num_frames", num_frames, 1), ("length", length, 1), ("overlap", overlap, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be a whole number from {low}, not {value!r}")
    if overlap >= length:
        raise ValueError(f"overlap must be below length, {length}, not {overlap}")
    if num_frames <= length:
        return [0]
    room = num_frames - length
    moves = -(-room // (length - overlap))
    return [i * room // moves for i in range(moves + 1)]


def window_weights(num_frames: int, length: int, overlap: int) -> Tensor:  # [windows, num_frames] in float64
    """The share that each window has in each frame: a triangle over the window, scaled so that every frame has 1."""
    starts = window_starts(num_frames, length, overlap)
    length = min(length, num_frames)
    place = torch.arange(length, dtype=torch.float64)
    triangle = torch.minimum(place + 1, length - place)
    weights = torch.zeros(len(starts), num_frames, dtype=torch.float64)
    for row, start in zip(weights, starts, strict=True):
        row[start : start + length] = triangle
    return weights / weights.sum(0)


def windowed(denoise: Denoiser, length: int, overlap: int, dim: int = 2) -> Denoiser:
    """The denoiser, called on windows of `length` frames along `dim` and averaged where they overlap.

    It may take more channels than it gives back. Latents of at most `length` frames pass through as they are.
    """

    def denoise_windows(latents: Tensor, timestep: int, step_index: int) -> Tensor:
        num_frames = latents.shape[dim]
        starts = window_starts(num_frames, length, overlap)
        if len(starts) == 1:
            return denoise(latents, timestep, step_index)
        weights = window_weights(num_frames, length, overlap)
        total = None
        shape = [length if d == dim % latents.dim() else 1 for d in range(latents.dim())]
        for start, row in zip(starts, weights, strict=True):
            velocity = denoise(latents.narrow(dim, start, length), timestep, step_index).float()
            if total is None:
                sizes = list(velocity.shape)
                sizes[dim] = num_frames
                total = velocity.new_zeros(sizes)
            share = row[start : start + length].to(total).view(shape)
            total.narrow(dim, start, length).add_(share * velocity)
        return total

    return denoise_windows
