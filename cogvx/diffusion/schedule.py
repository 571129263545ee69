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
    alpha: float  # of the latents, before the move
    next_alpha: float  # and after it
    trained_alpha: float  # that the denoiser knows for these latents: `alpha`, or the training alpha nearest to it


def cumulative_alphas(config: ScheduleConfig) -> Tensor:
    """The share of the clip's variance that is left at each training timestep, [num_train_timesteps] in float64.

    It falls to exactly 0: the last timestep is pure noise.

    Raises: ValueError for numbers that give no falling curve.
    """
    total, shift = config.num_train_timesteps, config.snr_shift_scale
    alphas = zero_terminal_snr(_shifted_alphas(config))
    if total < 2 or not bool((alphas.diff() < 0).all()):
        raise ValueError(
            f"num_train_timesteps {total}, beta_start {config.beta_start}, beta_end {config.beta_end} and "
            f"snr_shift_scale {shift} give no falling schedule; the released ones are 1000, 0.00085, 0.012 and 1 or 3"
        )
    return alphas


def zero_terminal_snr(alphas: Tensor, anchor: int = 0) -> Tensor:
    """The same curve, stretched in sqrt(alpha) so that the last timestep is pure noise and that of `anchor` stays."""
    signal = alphas.sqrt()
    first, last = signal[anchor], signal[-1]
    return ((signal - last) * (first / (first - last))) ** 2


def timesteps(config: ScheduleConfig, num_steps: int, rounding: str = "rounded") -> list[int]:
    """The timesteps that a sampler of `num_steps` steps visits, noisiest first: 999, 979, ..., 19 for 50.

    Where the count does not divide the training timesteps they are "rounded", 999, 966, 932, ... for 30, or
    "truncated", 999, 965, 932, ...

    Raises: ValueError for a number of steps that is not a whole number from 1 to `num_train_timesteps`.
    """
    _check_choice("rounding", rounding, ("rounded", "truncated"))
    total = config.num_train_timesteps
    if isinstance(num_steps, bool) or not isinstance(num_steps, int):
        raise ValueError(f"num_inference_steps must be a whole number from 1 to {total}, not {num_steps!r}")
    if not 1 <= num_steps <= total:
        nearest = min(max(num_steps, 1), total)
        raise ValueError(f"num_inference_steps must be from 1 to {total}, not {num_steps}; nearest: {nearest}")
    if rounding == "truncated":
        return [int(t) for t in np.linspace(total - 1, 0, num_steps, endpoint=False)]

    # The floating-point range can hold one number too many (61 steps: a 62nd at timestep -1), hence the cut.
    return [int(t) - 1 for t in np.round(np.arange(total, 0, -total / num_steps))[:num_steps]]


def sampling_steps(
    config: ScheduleConfig, num_steps: int, rounding: str = "rounded", moves: str = "stride", zero_snr: str = "all"
) -> list[Step]:
    """The moves of a sampler of `num_steps` steps.

    moves: "visited" goes from each visited timestep to the next one, and from the last to the finished clip. "stride"
    goes down by `num_train_timesteps // num_steps`, whichever timestep follows: at counts that do not divide, moves
    and visited timesteps drift apart by one here and there, and the last move may end at timestep 0 instead of the
    finished clip.

    zero_snr: "all" takes the alphas of training. "visited" stretches the visited ones anew, so that the last visited
    timestep keeps its alpha instead of timestep 0; the denoiser's velocity then is read with the training alpha whose
    root is nearest. One step visits pure noise alone, which is the same in both.
    """
    _check_choice("moves", moves, ("visited", "stride"))
    _check_choice("zero_snr", zero_snr, ("visited", "all"))
    visited = timesteps(config, num_steps, rounding)
    stride = config.num_train_timesteps // num_steps
    targets = [*visited[1:], -1] if moves == "visited" else [t - stride for t in visited]
    trained = cumulative_alphas(config)
    alphas = trained
    if zero_snr == "visited" and num_steps > 1:
        alphas = zero_terminal_snr(_shifted_alphas(config), anchor=visited[-1]).clamp(max=1)

    def trained_alpha(timestep: int) -> float:
        if zero_snr == "all":
            return trained[timestep].item()
        return trained[(trained.sqrt() - alphas[timestep].sqrt()).abs().argmin()].item()

    def alpha(timestep: int) -> float:
        return alphas[timestep].item() if timestep >= 0 else 1.0

    return [Step(t, to, alpha(t), alpha(to), trained_alpha(t)) for t, to in zip(visited, targets, strict=True)]


def _shifted_alphas(config: ScheduleConfig) -> Tensor:
    """The curve before its end is brought down to zero."""
    total, shift = config.num_train_timesteps, config.snr_shift_scale
    betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, total, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    return alphas / (shift + (1 - shift) * alphas)


def _check_choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{name} is {value!r}; valid: {', '.join(map(repr, valid))}")
