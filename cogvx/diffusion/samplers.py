"""From noise to latents: DDIM, DPM-Solver++ 2M as SDE and as ODE, and UniPC, for any callable that predicts velocity.

A sampler knows nothing of models, prompts or guidance. Latents are [B, C, T, H, W] (any shape works) and stay in fp32
between steps, whatever dtype the denoiser computes in, unless `latents_dtype` asks to round them. With v the velocity,
`x0 = sqrt(alpha) x - sqrt(1 - alpha) v`; lambda = log(sqrt(alpha / (1 - alpha))), which is -inf at the first step, pure
noise, and inf for the finished clip; h is the change of lambda in a step. A prime marks what a step leads to.
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
    latents_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sample without drawing noise (the generator is not used); first order.

    Source: "Denoising Diffusion Implicit Models" (arXiv 2010.02502), equation 12 with sigma 0.
    """
    x = rounded(latents, latents_dtype)
    for i, step in enumerate(steps):
        x = ddim_move(x, predict_clip(denoise, x, step, i), step.alpha, step.next_alpha)
        x = after_step(on_step, i, step, rounded(x, latents_dtype))
    return x


def dpmpp_2m_sde(
    denoise: Denoiser,
    latents: Tensor,  # [B, ...] noise
    steps: Sequence[Step],
    generator: Generators | None = None,
    on_step: OnStep | None = None,
    latents_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sample with fresh noise in every step, second order in the middle.

    With d the clip extrapolated from the last two predictions,
    `x' = sqrt((1-alpha')/(1-alpha)) e^-h x + sqrt(alpha') (1-e^-2h) d + sqrt((1-alpha') (1-e^-2h)) noise`.

    Source: "DPM-Solver++" (arXiv 2211.01095), SDE-DPM-Solver++(2M); the order of the noise draws is the released one.
    """
    x = rounded(latents, latents_dtype)
    previous_x0, previous_lambda = None, 0.0
    for i, step in enumerate(steps):
        x0 = d = predict_clip(denoise, x, step, i)
        now = half_log_snr(step.alpha)
        h = half_log_snr(step.next_alpha) - now
        noise = normal_like(x, generator)
        if previous_x0 is not None and step.next_alpha < 1:  # the clip itself is reached in the first order
            noise = normal_like(x, generator)  # a second-order step draws for a first-order one too and discards it
            weight = h / (2 * (now - previous_lambda))  # 0 after a step from pure noise, whose lambda is -inf
            d = (1 + weight) * x0 - weight * previous_x0
        keep = math.sqrt((1 - step.next_alpha) / (1 - step.alpha)) * math.exp(-h)
        fresh = -math.expm1(-2 * h)
        x = keep * x + math.sqrt(step.next_alpha) * fresh * d + math.sqrt((1 - step.next_alpha) * fresh) * noise
        previous_x0, previous_lambda = x0, now
        x = after_step(on_step, i, step, rounded(x, latents_dtype))
    return x


def dpmpp_2m(
    denoise: Denoiser,
    latents: Tensor,  # [B, ...] noise
    steps: Sequence[Step],
    generator: Generators | None = None,
    on_step: OnStep | None = None,
    latents_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sample without drawing noise, second order but in the first two steps and in one that ends at the finished clip.

    With d the clip extrapolated from the last two predictions,
    `x' = sqrt((1-alpha')/(1-alpha)) x + sqrt(alpha') (1-e^-h) d`.

    Source: "DPM-Solver++" (arXiv 2211.01095), DPM-Solver++(2M).
    """
    x = rounded(latents, latents_dtype)
    previous = None
    for i, step in enumerate(steps):
        x0, now = predict_clip(denoise, x, step, i), half_log_snr(step.alpha)
        x = exponential_move(x, x0 + _half_of_the_trend(x0, now, previous, step), step)
        previous = x0, now
        x = after_step(on_step, i, step, rounded(x, latents_dtype))
    return x


def unipc(
    denoise: Denoiser,
    latents: Tensor,  # [B, ...] noise
    steps: Sequence[Step],
    generator: Generators | None = None,
    on_step: OnStep | None = None,
    latents_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sample without drawing noise in few steps: each step's prediction also corrects the move that led to it.

    A move is predicted as in `dpmpp_2m`. Once the clip is predicted there, the move is made again from where it began,
    with that prediction as a third point, at no further call of the denoiser. What `on_step` replaces is not corrected.

    Source: "UniPC" (arXiv 2302.04867), order 2 with the corrector, B(h) = e^h - 1, on clip predictions.
    """
    x = rounded(latents, latents_dtype)
    previous = move = None  # move: the step before, where it began, and what it knew: x, x0, and what `previous` was
    for i, step in enumerate(steps):
        x0, now = predict_clip(denoise, x, step, i), half_log_snr(step.alpha)
        if move is not None:
            x = rounded(_corrected_move(*move, x0), latents_dtype)
        predicted = exponential_move(x, x0 + _half_of_the_trend(x0, now, previous, step), step)
        predicted = rounded(predicted, latents_dtype)
        known = step, x, x0, previous
        previous = x0, now
        x = after_step(on_step, i, step, predicted)
        move = known if x is predicted else None
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
}


def predict_clip(denoise: Denoiser, x: Tensor, step: Step, index: int) -> Tensor:
    """The finished latents as the denoiser sees them from this step, in fp32."""
    velocity = denoise(x, step.timestep, index).float()
    return math.sqrt(step.trained_alpha) * x - math.sqrt(1 - step.trained_alpha) * velocity


def ddim_move(x: Tensor, x0: Tensor, alpha: float, next_alpha: float) -> Tensor:
    """The same clip and noise, mixed anew; neither way from the finished clip, whose noise is not known.

    `x' = sqrt((1 - alpha') / (1 - alpha)) x + (sqrt(alpha') - sqrt(alpha) sqrt((1 - alpha') / (1 - alpha))) x0`
    """
    keep = math.sqrt((1 - next_alpha) / (1 - alpha))
    return keep * x + (math.sqrt(next_alpha) - math.sqrt(alpha) * keep) * x0


def exponential_move(x: Tensor, clip: Tensor, step: Step) -> Tensor:
    """The move that is exact while the predicted clip stays as it is.

    `x' = sqrt((1 - alpha') / (1 - alpha)) x + sqrt(alpha') (1 - e^-h) clip`
    """
    h = half_log_snr(step.next_alpha) - half_log_snr(step.alpha)
    keep = math.sqrt((1 - step.next_alpha) / (1 - step.alpha))
    return keep * x - math.sqrt(step.next_alpha) * math.expm1(-h) * clip


def _half_of_the_trend(x0: Tensor, now: float, previous: tuple[Tensor, float] | None, step: Step) -> Tensor | float:
    """How much the predicted clip changes in half of a step if it goes on as in the last one.

    0 where that is unknown: in the first step, in the second, behind which lambda is -inf, and on the way to inf.
    """
    h = half_log_snr(step.next_alpha) - now
    if previous is None or math.isinf(h):
        return 0.0
    return h / (2 * (now - previous[1])) * (x0 - previous[0])


def _corrected_move(
    step: Step, x: Tensor, x0: Tensor, previous: tuple[Tensor, float] | None, next_x0: Tensor
) -> Tensor:
    """A move through the predicted clips before it, at its begin and at its end, `next_x0`.

    With `y = x0 + c1 s + c2 s^2` through them, s the part of the step that is done, the clip that the move takes is
    `x0 + c1 b1 + c2 b2`, where b1 and b2 are the means of s and s^2 under the solver's weight, e^(h s).
    """
    change = next_x0 - x0
    if previous is None:  # from pure noise the clip changes evenly along e^lambda, so that the mean is exact
        return exponential_move(x, x0 + 0.5 * change, step)
    now = half_log_snr(step.alpha)
    h = half_log_snr(step.next_alpha) - now
    b1 = -1 / math.expm1(-h) - 1 / h
    if math.isinf(previous[1]):  # too far away to say anything of a bend
        return exponential_move(x, x0 + b1 * change, step)
    b2 = -1 / math.expm1(-h) - 2 * b1 / h
    before = (previous[1] - now) / h  # below 0
    bend = (change - (previous[0] - x0) / before) / (1 - before)
    return exponential_move(x, x0 + b1 * (change - bend) + b2 * bend, step)


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


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in fp32, with no more digits than `dtype` has."""
    return x.to(dtype).float()


def after_step(on_step: OnStep | None, index: int, step: Step, x: Tensor) -> Tensor:
    """x, or what `on_step` puts in its place."""
    replaced = on_step(index, step.timestep, x) if on_step is not None else None
    return x if replaced is None else replaced.float()
