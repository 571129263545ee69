"""What the transformer is trained on: the velocity between a clip and its noise.

Tensors are [B, ...], alpha is [B]: the cumulative alpha of each sample's timestep (`cumulative_alphas(config)[t]`).

Source: "Progressive Distillation for Fast Sampling of Diffusion Models" (arXiv 2202.00512) for the velocity,
"CogVideoX" (arXiv 2408.06072) for explicit uniform sampling.
"""

import torch
from torch import Tensor


def add_noise(clip: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """A noisy clip: `sqrt(alpha) clip + sqrt(1 - alpha) noise`."""
    signal, spread = _roots(alpha, clip)
    return signal * clip + spread * noise


def velocity(clip: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """What the transformer is to predict: `sqrt(alpha) noise - sqrt(1 - alpha) clip`."""
    signal, spread = _roots(alpha, clip)
    return signal * noise - spread * clip


def clip_from_velocity(noisy: Tensor, predicted: Tensor, alpha: Tensor) -> Tensor:
    """The clip that a predicted velocity stands for: `sqrt(alpha) noisy - sqrt(1 - alpha) predicted`."""
    signal, spread = _roots(alpha, noisy)
    return signal * noisy - spread * predicted


def velocity_loss(predicted: Tensor, clip: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """How wrong a predicted velocity is, a number a sample, [B] in fp32.

    It equals `mean((clip_from_velocity(...) - clip)^2 / (1 - alpha))`, the published weighting, but is written on the
    velocity, where nothing cancels or divides at either end of the schedule.
    """
    error = predicted.float() - velocity(clip.float(), noise.float(), alpha)
    return error.square().flatten(1).mean(1)


def draw_timesteps(count: int, num_train_timesteps: int, generator: torch.Generator | None = None) -> Tensor:
    """Timesteps to train on, [count]: each uniform on 0 ... num_train_timesteps - 1, whatever the others are."""
    return torch.randint(0, num_train_timesteps, (count,), generator=generator)


def spread_timesteps(
    count: int,
    num_train_timesteps: int,
    generator: torch.Generator | None = None,
    rank: int = 0,
    num_ranks: int = 1,
) -> Tensor:
    """Timesteps to train on, [count], that cover the whole range in every step, which steadies the loss.

    The range 0 ... num_train_timesteps - 1 is cut into as many intervals as all ranks together draw timesteps, and each
    of those comes from one of its own. Over all of them every timestep is exactly as likely as any other, at any number
    of ranks. Generators of different ranks must not be alike.

    Raises: ValueError for a rank outside of `num_ranks`.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, not {num_ranks}")
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must be from 0 to {num_ranks - 1}, not {rank}")
    # The intervals are those of real numbers: of whole ones they could not be equally long.
    interval = rank + num_ranks * torch.arange(count, dtype=torch.float64)
    place = interval + torch.rand(count, generator=generator, dtype=torch.float64)
    return (place * num_train_timesteps / (count * num_ranks)).long().clamp(max=num_train_timesteps - 1)


def _roots(alpha: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha) and sqrt(1 - alpha), shaped to multiply `like`; taken in alpha's own dtype, float64."""
    shape = (-1,) + (1,) * (like.dim() - 1)
    return tuple(root.view(shape).to(like.device, like.dtype) for root in (alpha.sqrt(), (1 - alpha).sqrt()))
