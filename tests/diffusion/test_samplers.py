import math

import pytest
import torch

from cogvx.diffusion.samplers import SAMPLERS, ddim, dpmpp_2m_sde
from cogvx.diffusion.schedule import sampling_steps

MEAN = 0.7  # of gaussian_denoiser


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle_sample(scheduler, denoise, latents, num_steps, generator):
    scheduler.set_timesteps(num_steps)
    previous, previous_x0 = None, None
    for i, t in enumerate(scheduler.timesteps):
        v = denoise(latents, t.item(), i)
        if "DPM" in type(scheduler).__name__:
            latents, previous_x0 = scheduler.step(v, previous_x0, t, previous, latents, generator=generator)
        else:
            latents = scheduler.step(v, t, latents, return_dict=False)[0]
        previous = t
    return latents


@pytest.mark.parametrize("num_steps", [1, 2, 7, 10, 30, 50])
@pytest.mark.parametrize("changes", [{}, {"snr_shift_scale": 1.0}])
@pytest.mark.parametrize(
    ("name", "oracle_name"), [("ddim", "CogVideoXDDIMScheduler"), ("dpmpp_2m_sde", "CogVideoXDPMScheduler")]
)
def test_samplers_match_the_oracle(make_config, make_oracle, name, oracle_name, changes, num_steps, nonlinear_denoiser):
    latents, denoise = noise(1, 16, 3, 4, 6), nonlinear_denoiser
    steps = sampling_steps(make_config(**changes), num_steps)
    ours = SAMPLERS[name](denoise, latents, steps, torch.Generator().manual_seed(5))
    oracle = make_oracle(oracle_name, **changes)
    theirs = oracle_sample(oracle, denoise, latents, num_steps, torch.Generator().manual_seed(5))
    assert (ours - theirs).norm() / theirs.norm() <= 1e-5
    assert ours.dtype == torch.float32


def test_dpm_on_a_gaussian_reaches_its_distribution_at_second_order(make_config, gaussian_denoiser):
    config, count, std = make_config(snr_shift_scale=1.0), 400_000, 1.0
    generator = torch.Generator().manual_seed(3)
    errors = []
    for num_steps in (5, 10, 20):
        start = torch.randn(count, generator=generator)
        clip = dpmpp_2m_sde(gaussian_denoiser(config, std), start, sampling_steps(config, num_steps), generator)
        assert abs(clip.double().mean().item() - MEAN) < 5 * std / math.sqrt(count)
        errors.append(abs(clip.double().std().item() / std - 1))
    assert errors[-1] < 0.015  # the estimate itself is good to 0.0011
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_point_is_reached_exactly(make_config, name, gaussian_denoiser):
    denoise = gaussian_denoiser(make_config(), std=0.0)
    clip = SAMPLERS[name](denoise, noise(2, 50), sampling_steps(make_config(), 10), torch.Generator().manual_seed(0))
    torch.testing.assert_close(clip, torch.full_like(clip, MEAN), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_stay_in_fp32_around_a_half_precision_denoiser(make_config, name, nonlinear_denoiser):
    seen, denoise = [], nonlinear_denoiser

    def half(latents, timestep, step_index):
        seen.append((latents.dtype, step_index, timestep))
        return denoise(latents, timestep, step_index).bfloat16()

    steps = sampling_steps(make_config(), 5)
    clip = SAMPLERS[name](half, noise(1, 16, 1, 2, 2).bfloat16(), steps, torch.Generator().manual_seed(0))
    assert clip.dtype == torch.float32
    assert seen == [(torch.float32, i, t) for i, t in enumerate([999, 799, 599, 399, 199])]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_start_is_not_written_to(make_config, name, nonlinear_denoiser):
    start = noise(1, 16, 1, 2, 2)
    before = start.clone()
    SAMPLERS[name](nonlinear_denoiser, start, sampling_steps(make_config(), 3), torch.Generator().manual_seed(0))
    assert torch.equal(start, before)


@pytest.mark.parametrize("name", SAMPLERS)
def test_on_step_sees_every_step_and_may_replace_the_latents(make_config, name, nonlinear_denoiser):
    calls = []

    def on_step(step_index, timestep, latents):
        calls.append((step_index, timestep))
        return torch.zeros_like(latents) if step_index == 3 else None

    steps = sampling_steps(make_config(), 4)
    generator = torch.Generator().manual_seed(0)
    clip = SAMPLERS[name](nonlinear_denoiser, noise(1, 16, 1, 2, 2), steps, generator, on_step)
    assert calls == [(0, 999), (1, 749), (2, 499), (3, 249)]
    assert not clip.any()


def test_one_generator_a_sample_makes_samples_independent_of_their_batch(make_config, nonlinear_denoiser):
    steps, denoise = sampling_steps(make_config(), 6), nonlinear_denoiser
    start = noise(3, 16, 1, 2, 2)
    seeds = [torch.Generator().manual_seed(7 + i) for i in range(3)]
    together = dpmpp_2m_sde(denoise, start, steps, seeds)
    for i in range(3):
        alone = dpmpp_2m_sde(denoise, start[i : i + 1], steps, torch.Generator().manual_seed(7 + i))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="one generator for each of 3 samples, not 2"):
        dpmpp_2m_sde(denoise, start, steps, seeds[:2])


def test_ddim_does_not_touch_the_random_state(make_config, nonlinear_denoiser):
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state(), torch.get_rng_state()
    ddim(nonlinear_denoiser, noise(1, 16, 1, 2, 2), sampling_steps(make_config(), 3), generator)
    assert torch.equal(generator.get_state(), before[0]) and torch.equal(torch.get_rng_state(), before[1])
