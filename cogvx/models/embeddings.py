"""Where a token is and when: rotations, sinusoids and the learned table, at the trained grid and at any other.

B batch, T frames, H W height and width of a grid of patches, N = T H W vision tokens in that order, L text tokens,
D width, E head width. Tables without weights are computed once a grid, in fp32 or better, on the CPU, so that every
device gets the same numbers.

Source: "CogVideoX" (arXiv 2408.06072), section 2.2, and the released configurations.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..config import TransformerConfig

Grid = tuple[int, int, int]  # T, H, W in patches
ROPE_RULES = ("rescaled", "sliced")
TABLE_RULES = ("recomputed", "sliced", "resampled")


@dataclass(frozen=True)
class Placement:
    """Where patches lie; for all but `rounded` this is a choice at grids other than the trained one alone.

    rope: "rescaled" fits the grid into the trained one, "sliced" counts on from 0 in whole steps.
    table: of what is added once. "recomputed" makes sinusoids for the new grid, "sliced" takes the first rows of the
    trained grid's table, whatever place they had there; "resampled", of a learned table alone, interpolates in it.
    intrinsic: RIFLEx, for clips longer than trained: the number, from 1 on, of the frequency in time that is lowered.
    rounded: q and k are rotated in the model's dtype, as in training, instead of in fp32.
    """

    rope: str = "rescaled"
    table: str = "recomputed"
    intrinsic: int | None = None
    rounded: bool = False

    def __post_init__(self) -> None:
        for name, rules in (("rope", ROPE_RULES), ("table", TABLE_RULES)):
            if getattr(self, name) not in rules:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(rules)}")
        k = self.intrinsic
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(f"intrinsic is {k!r}; it must be None or the number of a frequency, from 1")


def default_placement(config: TransformerConfig) -> Placement:
    """What the diffusers library does, but for a learned table: that it uses at the trained grid alone.

    The official training code has Placement("sliced", "sliced", rounded=True) for every model.
    """
    return Placement(
        "rescaled" if config.patch_size_t is None else "sliced",
        "resampled" if config.use_learned_positional_embeddings else "recomputed",
    )


def timestep_embedding(
    timestep: Tensor,  # [B], 0 ... 999
    width: int,
) -> Tensor:  # [B, width]
    """A diffusion timestep as cosines, then sines, of falling frequency; fp32."""
    half = width // 2
    exponents = -math.log(1e4) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep[:, None].float() * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def forget_positions() -> None:
    """Free the tables that are kept between calls; they are made again when they are needed."""
    sincos_positions.cache_clear()
    rope_positions.cache_clear()


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


def first_rows(table: Tensor, grid: Grid) -> Tensor:
    """As many rows of a table made for another grid as this one has patches, [N, D]. Raises ValueError: too few."""
    count = math.prod(grid)
    if count > len(table):
        raise ValueError(f"{count} patches do not fit the {len(table)} positions that the model was trained with; "
                         "let the table be recomputed or resampled")  # fmt: skip
    return table[:count]


def resampled(
    table: Tensor,  # [T0 H0 W0, D], learned at the trained grid
    grid: Grid,
    trained: Grid,
) -> Tensor:  # [N, D]
    """A learned table at the positions of another grid, interpolated linearly along each axis.

    Height and width are fitted into the trained ones as `rope_positions` does. A shorter clip takes the first frames, a
    longer one stretches them over its length.
    """
    rows, columns = (_linspace(*ends, n) for ends, n in zip(_span(grid, trained), grid[1:], strict=True))
    stretch = (trained[0] - 1) / max(trained[0] - 1, grid[0] - 1, 1)
    frames = torch.arange(grid[0], device="cpu") * stretch
    x = table.unflatten(0, trained)
    for axis, positions in enumerate((frames, rows, columns)):
        if not torch.equal(positions, torch.arange(trained[axis], device="cpu").to(positions)):
            weights = _between(positions, trained[axis]).to(x.device)
            x = torch.tensordot(weights, x.float(), dims=([1], [axis])).movedim(0, axis)
    return x.flatten(0, 2)


def _between(positions: Tensor, size: int) -> Tensor:  # [n], within 0 ... size - 1 once clamped -> [n, size]
    """Weights of linear interpolation: two a row, or one."""
    distance = positions.clamp(0, size - 1)[:, None] - torch.arange(size, device="cpu")
    return (1 - distance.abs()).clamp(min=0)


@lru_cache(maxsize=4)
def rope_positions(
    grid: Grid,
    trained: tuple[int, int],
    head_width: int,
    device: torch.device,
    rule: str = "rescaled",
    intrinsic: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each vision token's rotations, [N, E] each: E / 4 for time, 3 E / 8 each for H and for W.

    `trained` is the height and width in patches that the model was trained at. "rescaled": another grid is scaled, with
    its proportions kept, to the largest size that fits it, and centred; its n coordinates then run from the start to
    (n - 1) / n of the end. "sliced": coordinates are 0, 1, 2 ... in every grid, those of a larger one beyond all that
    were trained. `intrinsic` is that of `lowered`.

    Source: "rescaled" is what the diffusers library does for the 1.0 models, "sliced" what it does for 1.5 and what the
    official training code does for all; both slice a table of a fixed size, which fails where the grid is larger.
    """
    num_frames, height, width = grid
    with torch.inference_mode(False):
        t, h, w = (torch.arange(n, dtype=torch.float32, device="cpu") for n in grid)
        if rule == "rescaled":
            rows, columns = _span(grid, (num_frames, *trained))
            h, w = _linspace(*rows, height), _linspace(*columns, width)
        turns = lowered(_frequencies(head_width // 4), intrinsic, num_frames)
        angles = [
            torch.outer(t, turns)[:, None, None].expand(*grid, -1),
            torch.outer(h, _frequencies(head_width * 3 // 8))[None, :, None].expand(*grid, -1),
            torch.outer(w, _frequencies(head_width * 3 // 8))[None, None, :].expand(*grid, -1),
        ]
        pairs = torch.cat(angles, dim=-1).flatten(0, 2).repeat_interleave(2, dim=-1)
        return pairs.cos().to(device), pairs.sin().to(device)


def _frequencies(width: int) -> Tensor:  # [width / 2], radians a step
    return 1.0 / 1e4 ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)


def lowered(frequencies: Tensor, intrinsic: int | None, num_frames: int) -> Tensor:
    """RIFLEx: frequency number `intrinsic`, from 1, so low that a clip of this length is within 0.9 of its period.

    A clip longer than that period repeats itself; the faster frequencies hold motion and stay as they were trained. A
    period that is long enough stays too. None lowers nothing.

    Source: "RIFLEx" (arXiv 2502.15894), equation 8; the factor 0.9 is that of the authors' code.
    """
    if intrinsic is None:
        return frequencies
    if not 1 <= intrinsic <= len(frequencies):
        raise ValueError(f"intrinsic is {intrinsic}; time has the frequencies 1 to {len(frequencies)}")
    changed = frequencies.clone()
    changed[intrinsic - 1].clamp_(max=0.9 * 2 * math.pi / num_frames)
    return changed


def intrinsic_frequency(trained_frames: int, head_width: int) -> int:
    """The frequency that RIFLEx lowers: the fastest one that never repeated in training.

    trained_frames: patches in time. For the 13 of CogVideoX-5B it is 2, as the authors of RIFLEx found by trial.
    """
    periods = 2 * math.pi / _frequencies(head_width // 4)
    long_enough = [k for k, period in enumerate(periods.tolist(), 1) if period >= trained_frames]
    return long_enough[0] if long_enough else len(periods)


def _linspace(first: float, last: float, count: int) -> Tensor:
    return torch.linspace(first, last, count, dtype=torch.float32, device="cpu")


def _span(grid: Grid, trained: Grid) -> tuple[tuple[float, float], tuple[float, float]]:
    """First and last coordinate of rows and of columns, scaled into the trained grid and centred there."""
    (top, bottom), (left, right) = _fit(*grid[1:], trained[1:])
    return (top, bottom * (grid[1] - 1) / grid[1]), (left, right * (grid[2] - 1) / grid[2])


def _fit(height: int, width: int, trained: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Start and end of each axis, when the grid is scaled into the trained one and centred there."""
    if height / width > trained[0] / trained[1]:
        scaled = trained[0], round(trained[0] / height * width)
    else:
        scaled = round(trained[1] / width * height), trained[1]
    starts = [round((room - size) / 2.0) for room, size in zip(trained, scaled, strict=True)]
    return (starts[0], starts[0] + scaled[0]), (starts[1], starts[1] + scaled[1])
