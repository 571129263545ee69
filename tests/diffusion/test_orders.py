"""Solvers of the probability flow: their order on a Gaussian, whose flow is known, and diffusers' answers."""

import math
from itertools import pairwise

import pytest
import torch

from cogvx.diffusion.samplers import SAMPLERS, dpmpp_2m, unipc
from cogvx.diffusion.schedule import Step, cumulative_alphas, sampling_steps

MEAN = 0.7  # of gaussian_denoiser
START = torch.randn(1000, generator=torch.Generator().manual_seed(0))


def even_steps(config, count, last=199):
    """From pure noise to timestep `last`, where every solver can still keep its order."""
    alphas, stride = cumulative_alphas(config).tolist(), (999 - last) // count
    at = [999 - stride * i for i in range(count + 1)]
    return [Step(t, to, alphas[t], alphas[to], alphas[t]) for t, to in pairwise(at)]


def flow(alpha, std):
    """Where the flow has brought START at a level of noise: it keeps every point's quantile."""
    return math.sqrt(alpha) * MEAN + math.sqrt(alpha * std**2 + 1 - alpha) * START


def error(name, config, denoise, std, steps):
    exact = flow(steps[-1].next_alpha, std)
    return ((SAMPLERS[name](denoise, START, steps) - exact).norm() / exact.norm()).item()


# How much smaller the error gets when the count doubles: 2 for order 1, 4 for order 2; the corrector gives UniPC more.
@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("name", "low", "high"), [("ddim", 1.9, 2.1), ("dpmpp_2m", 3.5, 4.8), ("unipc", 4.4, 16)])
def test_the_error_falls_with_the_order(name, low, high, std, make_config, gaussian_denoiser):
    config = make_config(snr_shift_scale=1.0)
    denoise = gaussian_denoiser(config, std)
    errors = [error(name, config, denoise, std, even_steps(config, count)) for count in (10, 20, 40, 80)]
    ratios = [before / after for before, after in pairwise(errors)]
    assert all(low <= ratio <= high for ratio in ratios), (errors, ratios)


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_the_better_solver_needs_fewer_steps(std, make_config, gaussian_denoiser):
    config = make_config(snr_shift_scale=1.0)
    denoise = gaussian_denoiser(config, std)
    ddim, two, three = (error(name, config, denoise, std, even_steps(config, 10)) for name in
                        ("ddim", "dpmpp_2m", "unipc"))  # fmt: skip
    assert three < two / 3 < ddim / 9


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc"])
def test_to_the_finished_clip_the_last_step_decides(name, make_config, gaussian_denoiser):
    """It returns what is predicted before it, which is off by (1 - alpha) / (2 std^2): halved by twice the steps."""
    config, std = make_config(snr_shift_scale=1.0), 2.0
    denoise = gaussian_denoiser(config, std)
    errors = [error(name, config, denoise, std, sampling_steps(config, n, moves="visited")) for n in (50, 100, 200)]
    assert errors[0] < 0.05 and errors[0] > 1.7 * errors[1] > 1.7**2 * errors[2]


def oracle_sample(scheduler, denoise, x, steps):
    """diffusers' solver over our steps: its tables are replaced, its formulas are not."""
    scheduler.set_timesteps(len(steps))
    alphas = torch.tensor([*(step.alpha for step in steps), steps[-1].next_alpha], dtype=torch.float64)
    scheduler.sigmas = ((1 - alphas) / alphas).sqrt()
    scheduler.timesteps = torch.tensor([step.timestep for step in steps])
    scheduler.num_inference_steps = len(steps)
    for i, step in enumerate(steps):
        x = scheduler.step(denoise(x, step.timestep, i), step.timestep, x).prev_sample
    return x


@pytest.mark.parametrize("count", [3, 8, 20])
@pytest.mark.parametrize(("ours", "class_name", "options"), [
    (unipc, "UniPCMultistepScheduler", {"solver_type": "bh2", "lower_order_final": False}),
    (dpmpp_2m, "DPMSolverMultistepScheduler", {"solver_type": "midpoint", "euler_at_final": True}),
])  # fmt: skip
def test_solvers_are_the_oracles_where_it_has_no_step_from_pure_noise(
    ours, class_name, options, count, make_config, nonlinear_denoiser
):
    diffusers = pytest.importorskip("diffusers")
    steps = sampling_steps(make_config(), 2 * count, moves="visited")[1 : count + 2]
    if ours is dpmpp_2m:
        steps = sampling_steps(make_config(), count + 1, moves="visited")[1:]
    start = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    scheduler = getattr(diffusers, class_name)(prediction_type="v_prediction", solver_order=2, **options)
    theirs = oracle_sample(scheduler, nonlinear_denoiser, start, steps)
    mine = ours(nonlinear_denoiser, start, steps)
    assert (mine - theirs).norm() / theirs.norm() <= 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_rounded_latents_have_no_more_digits(name, make_config, nonlinear_denoiser):
    seen = []

    def denoise(latents, timestep, step_index):
        seen.append(latents)
        return nonlinear_denoiser(latents, timestep, step_index)

    start, generator = torch.randn(1, 16, 1, 2, 2), torch.Generator().manual_seed(0)
    steps = sampling_steps(make_config(), 5)
    seen.append(SAMPLERS[name](denoise, start, steps, generator, None, torch.bfloat16))
    for latents in seen:
        assert latents.dtype == torch.float32 and torch.equal(latents, latents.bfloat16().float())


def test_what_replaces_the_latents_is_not_corrected_away(make_config, gaussian_denoiser):
    config, other = make_config(), torch.full((50,), 3.0)
    denoise = gaussian_denoiser(config, 1.0)
    steps = sampling_steps(config, 6, moves="visited")
    replaced = unipc(denoise, START[:50], steps, on_step=lambda i, t, x: other if i == 2 else None)
    assert replaced.std() < 0.02  # little is left of the different starts: what their last prediction says of a trend
    assert unipc(denoise, START[:50], steps).std() > 0.5
