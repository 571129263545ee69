"""How much of the clip and how much noise there is at every timestep, and which timesteps a sampler visits.

`alpha` is always the cumulative product: a noisy clip is `sqrt(alpha) * clip + sqrt(1 - alpha) * noise`.

Source: "CogVideoX" (arXiv 2408.06072), "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv
2305.08891) for the zero SNR of the last timestep, and the released scheduler configurations.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import ScheduleConfig


class Step(NamedTuple):
    """One move of a sampler, from `timestep` to `next_timestep` (below 0: to the finished clip)."""

    timestep: int
    next_timestep: int
    alpha: float
    next_alpha: float


def cumulative_alphas(config: ScheduleConfig) -> Tensor:
    """The share of the clip's variance that is left at each training timestep, [num_train_timesteps] in float64.

    It falls to exactly 0: the last timestep is pure noise.

    Raises: ValueError for numbers that give no falling curve.
    """
    total, shift = config.num_train_timesteps, config.snr_shift_scale
    betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, total, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    alphas = zero_terminal_snr(alphas / (shift + (1 - shift) * alphas))
    if total < 2 or not bool((alphas.diff() < 0).all()):
        raise ValueError(
            f"num_train_timesteps {total}, beta_start {config.beta_start}, beta_end {config.beta_end} and "
            f"snr_shift_scale {shift} give no falling schedule; the released ones are 1000, 0.00085, 0.012 and 1 or 3"
        )
    return alphas


def zero_terminal_snr(alphas: Tensor) -> Tensor:
    """The same curve, stretched in sqrt(alpha) so that the last timestep is pure noise and the first stays."""
    signal = alphas.sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * (first / (first - last))) ** 2


def timesteps(config: ScheduleConfig, num_steps: int) -> list[int]:
    """The timesteps that a sampler of `num_steps` steps visits, noisiest first: 999, 979, ..., 19 for 50.

    Where the count does not divide the training timesteps they are rounded: 999, 966, 932, ... for 30.

    Raises: ValueError for a number of steps that is not a whole number from 1 to `num_train_timesteps`.
    """
    total = config.num_train_timesteps
    if isinstance(num_steps, bool) or not isinstance(num_steps, int):
        raise ValueError(f"num_inference_steps must be a whole number from 1 to {total}, not {num_steps!r}")
    if not 1 <= num_steps <= total:
        nearest = min(max(num_steps, 1), total)
        raise ValueError(f"num_inference_steps must be from 1 to {total}, not {num_steps}; nearest: {nearest}")

    # The floating-point range can hold one number too many (61 steps: a 62nd at timestep -1), hence the cut.
    return [int(t) - 1 for t in np.round(np.arange(total, 0, -total / num_steps))[:num_steps]]


def sampling_steps(config: ScheduleConfig, num_steps: int) -> list[Step]:
    """The moves of a sampler of `num_steps` steps.

    Each move goes down by `num_train_timesteps // num_steps`, whichever timestep follows: at counts that do not
    divide, moves and visited timesteps drift apart by one here and there, and the last move may end at timestep 0
    instead of the finished clip. Published results have this property, so ours have it too.
    """
    visited = timesteps(config, num_steps)
    alphas = cumulative_alphas(config).tolist()
    stride = config.num_train_timesteps // num_steps
    return [Step(t, t - stride, alphas[t], alphas[t - stride] if t >= stride else 1.0) for t in visited]
