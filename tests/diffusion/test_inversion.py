import math
from itertools import pairwise

import pytest
import torch

from cogvx.diffusion.inversion import ddim_inversion
from cogvx.diffusion.samplers import ddim
from cogvx.diffusion.schedule import sampling_steps

MEAN, STD = 0.7, 2.0  # of the denoiser
CLIP = MEAN + STD * torch.randn(1000, generator=torch.Generator().manual_seed(0))
COUNTS = (10, 20, 50, 100, 200)


@pytest.fixture
def setting(make_config, gaussian_denoiser):
    config = make_config(snr_shift_scale=1.0)
    return gaussian_denoiser(config, STD), lambda n, **how: sampling_steps(config, n, moves="visited", **how)


def reconstruction_error(denoise, steps, refinements=0):
    clip = ddim(denoise, ddim_inversion(denoise, CLIP, steps, refinements), steps)
    return ((clip - CLIP).norm() / CLIP.norm()).item()


def test_the_reconstruction_error_falls_with_the_steps(setting):
    denoise, steps = setting
    errors = [reconstruction_error(denoise, steps(n)) for n in COUNTS]
    assert all(after < 0.75 * before for before, after in pairwise(errors)), errors
    assert errors[-1] < 0.013


def test_the_noise_is_that_of_the_exact_flow(setting):
    denoise, steps = setting
    exact = (CLIP - MEAN) / STD
    errors = [((ddim_inversion(denoise, CLIP, steps(n)) - exact).norm() / exact.norm()).item() for n in COUNTS]
    assert all(after < before for before, after in pairwise(errors)) and errors[-1] < 0.01


def test_refinements_make_it_exact(setting):
    denoise, steps = setting
    errors = [reconstruction_error(denoise, steps(20), refinements) for refinements in (0, 1, 2, 4, 8)]
    assert all(after < before for before, after in pairwise(errors)), errors
    assert errors[-1] < errors[0] / 100


@pytest.mark.parametrize("zero_snr", ["all", "visited"])
def test_a_random_function_is_inverted_too(zero_snr, make_config, nonlinear_denoiser):
    def mild(latents, timestep, step_index):  # the fixed point of each move must attract
        return 0.3 * nonlinear_denoiser(latents, timestep, step_index)

    steps = sampling_steps(make_config(), 25, "truncated", "visited", zero_snr)
    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    clip = ddim(mild, noise, steps)
    back = ddim_inversion(mild, clip, steps, refinements=12)
    assert (back - noise).norm() / noise.norm() < 1e-4


def test_on_step_sees_the_steps_backwards(setting):
    denoise, steps = setting
    calls = []
    ddim_inversion(denoise, CLIP, steps(4), on_step=lambda i, t, x: calls.append((i, t)))
    assert calls == [(3, 249), (2, 499), (1, 749), (0, 999)]


@pytest.mark.parametrize("refinements", [-1, 1.5, True])
def test_refinements_are_a_whole_number(refinements, setting):
    denoise, steps = setting
    with pytest.raises(ValueError, match="refinements must be a whole number from 0, not"):
        ddim_inversion(denoise, CLIP, steps(2), refinements)


def test_latents_are_not_written_to(setting):
    denoise, steps = setting
    before = CLIP.clone()
    assert math.isfinite(ddim_inversion(denoise, CLIP, steps(3)).sum().item())
    assert torch.equal(CLIP, before)
