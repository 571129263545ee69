"""Where a token is and when: the tables that carry no weights.

B batch, T frames, H W height and width of a grid of patches, N = T H W vision tokens in that order, D width, E head
width. Tables are computed once a grid, in fp32 or better, on the CPU, so that every device gets the same numbers.

Source: "CogVideoX" (arXiv 2408.06072), section 2.2, and the released configurations.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

Grid = tuple[int, int, int]  # T, H, W in patches


def timestep_embedding(
    timestep: Tensor,  # [B], 0 ... 999
    width: int,
) -> Tensor:  # [B, width]
    """A diffusion timestep as cosines, then sines, of falling frequency; fp32."""
    half = width // 2
    exponents = -math.log(1e4) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep[:, None].float() * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@lru_cache(maxsize=4)
def sincos_positions(grid: Grid, width: int, space_scale: float, time_scale: float, device: torch.device) -> Tensor:
    """What is added to each vision token once, [N, D]: a quarter of the width for time, 3/8 each for W and for H."""
    with torch.inference_mode(False):  # a cached inference tensor could never be used in training
        t, h, w = (torch.arange(n, dtype=torch.float32, device="cpu") for n in grid)
        tables = (
            _sincos(t / time_scale, width // 4)[:, None, None],
            _sincos(w / space_scale, width * 3 // 8)[None, None, :],
            _sincos(h / space_scale, width * 3 // 8)[None, :, None],
        )
        return torch.cat([table.expand(*grid, -1) for table in tables], dim=-1).flatten(0, 2).float().to(device)


def _sincos(positions: Tensor, width: int) -> Tensor:  # [n] -> [n, width], float64
    frequencies = 1e4 ** (-torch.arange(width // 2, dtype=torch.float64, device="cpu") / (width / 2))
    angles = torch.outer(positions.double(), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@lru_cache(maxsize=4)
def rope_positions(
    grid: Grid, trained: tuple[int, int], head_width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each vision token's rotations, [N, E] each: E / 4 for time, 3 E / 8 each for H and for W.

    `trained` is the height and width in patches that the model was trained at. Another grid is scaled, with its
    proportions kept, to the largest size that fits it, and centred; its n coordinates then run from the start to
    (n - 1) / n of the end.

    Source: the rule that the diffusers library applies to the 1.0 models.
    """
    num_frames, height, width = grid
    (top, bottom), (left, right) = _fit(height, width, trained)
    with torch.inference_mode(False):
        t = torch.arange(num_frames, dtype=torch.float32, device="cpu")
        h = torch.linspace(top, bottom * (height - 1) / height, height, dtype=torch.float32, device="cpu")
        w = torch.linspace(left, right * (width - 1) / width, width, dtype=torch.float32, device="cpu")
        angles = [
            _angles(t, head_width // 4)[:, None, None].expand(*grid, -1),
            _angles(h, head_width * 3 // 8)[None, :, None].expand(*grid, -1),
            _angles(w, head_width * 3 // 8)[None, None, :].expand(*grid, -1),
        ]
        pairs = torch.cat(angles, dim=-1).flatten(0, 2).repeat_interleave(2, dim=-1)
        return pairs.cos().to(device), pairs.sin().to(device)


def _angles(positions: Tensor, width: int) -> Tensor:  # [n] -> [n, width / 2]
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    return torch.outer(positions, 1.0 / 1e4**exponents)


def _fit(height: int, width: int, trained: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last coordinate of each axis, when the grid is scaled into the trained one and centred there."""
    if height / width > trained[0] / trained[1]:
        scaled = trained[0], round(trained[0] / height * width)
    else:
        scaled = round(trained[1] / width * height), trained[1]
    starts = [round((room - size) / 2.0) for room, size in zip(trained, scaled, strict=True)]
    return (starts[0], starts[0] + scaled[0]), (starts[1], starts[1] + scaled[1])
