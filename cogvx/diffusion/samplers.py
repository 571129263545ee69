"""From noise to latents: DDIM and DPM-Solver++ 2M SDE, for any callable that predicts velocity.

A sampler knows nothing of models, prompts or guidance. Latents are [B, C, T, H, W] (any shape works) and stay in fp32
between steps, whatever dtype the denoiser computes in. With v the velocity, `x0 = sqrt(alpha) x - sqrt(1 - alpha) v`.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .schedule import Step

Denoiser = Callable[[Tensor, int, int], Tensor]  # (latents, timestep, step index) -> velocity, guidance applied
OnStep = Callable[[int, int, Tensor], Tensor | None]  # (step index, timestep, latents) -> new latents
Generators = torch.Generator | Sequence[torch.Generator]  # one for the batch, or one for each sample of it


def ddim(
    denoise: Denoiser,
    latents: Tensor,  # [B, ...] noise
    steps: Sequence[Step],
    generator: Generators | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample without drawing noise (the generator is not used).

    `x' = sqrt((1 - alpha') / (1 - alpha)) x + (sqrt(alpha') - sqrt(alpha) sqrt((1 - alpha') / (1 - alpha))) x0`

    Source: "Denoising Diffusion Implicit Models" (arXiv 2010.02502), equation 12 with sigma 0.
    """
    x = latents.float()
    for i, step in enumerate(steps):
        x0 = predict_clip(denoise, x, step, i)
        keep = math.sqrt((1 - step.next_alpha) / (1 - step.alpha))
        x = keep * x + (math.sqrt(step.next_alpha) - math.sqrt(step.alpha) * keep) * x0
        x = _after_step(on_step, i, step, x)
    return x


def dpmpp_2m_sde(
    denoise: Denoiser,
    latents: Tensor,  # [B, ...] noise
    steps: Sequence[Step],
    generator: Generators | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample with fresh noise in every step, second order in the middle.

    With lambda = log(sqrt(alpha / (1 - alpha))), h = lambda' - lambda and d the clip extrapolated from the last two
    predictions, `x' = sqrt((1-alpha')/(1-alpha)) e^-h x + sqrt(alpha') (1-e^-2h) d + sqrt((1-alpha') (1-e^-2h)) noise`.

    Source: "DPM-Solver++" (arXiv 2211.01095), SDE-DPM-Solver++(2M); the order of the noise draws is the released one.
    """
    x = latents.float()
    previous_x0, previous_lambda = None, 0.0
    for i, step in enumerate(steps):
        x0 = d = predict_clip(denoise, x, step, i)
        now = half_log_snr(step.alpha)
        h = half_log_snr(step.next_alpha) - now
        noise = normal_like(x, generator)
        if previous_x0 is not None and step.next_timestep >= 0:
            noise = normal_like(x, generator)  # a second-order step draws for a first-order one too and discards it
            weight = h / (2 * (now - previous_lambda))  # 0 after a step from pure noise, whose lambda is -inf
            d = (1 + weight) * x0 - weight * previous_x0
        keep = math.sqrt((1 - step.next_alpha) / (1 - step.alpha)) * math.exp(-h)
        fresh = -math.expm1(-2 * h)
        x = keep * x + math.sqrt(step.next_alpha) * fresh * d + math.sqrt((1 - step.next_alpha) * fresh) * noise
        previous_x0, previous_lambda = x0, now
        x = _after_step(on_step, i, step, x)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddim": ddim, "dpmpp_2m_sde": dpmpp_2m_sde}


def predict_clip(denoise: Denoiser, x: Tensor, step: Step, index: int) -> Tensor:
    """The finished latents as the denoiser sees them from this step, in fp32."""
    velocity = denoise(x, step.timestep, index).float()
    return math.sqrt(step.alpha) * x - math.sqrt(1 - step.alpha) * velocity


def half_log_snr(alpha: float) -> float:
    """lambda = log(sqrt(alpha / (1 - alpha))): -inf for pure noise, inf for the finished clip."""
    if alpha <= 0 or alpha >= 1:
        return -math.inf if alpha <= 0 else math.inf
    return 0.5 * (math.log(alpha) - math.log1p(-alpha))


def normal_like(x: Tensor, generator: Generators | None) -> Tensor:
    """Normal noise of x's shape, drawn where the generator lives, so that a CPU seed means the same on every device.

    Raises: ValueError when the number of generators is not the batch size.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = x.device if generator is None else generator.device
        return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
    if len(generator) != len(x):
        raise ValueError(f"generator must hold one generator for each of {len(x)} samples, not {len(generator)}")
    return torch.cat([normal_like(sample[None], one) for sample, one in zip(x, generator, strict=True)])


def _after_step(on_step: OnStep | None, index: int, step: Step, x: Tensor) -> Tensor:
    replaced = on_step(index, step.timestep, x) if on_step is not None else None
    return x if replaced is None else replaced.float()
