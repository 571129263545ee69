"""The numerics of the official code, against an oracle that knows nothing of ours."""

import importlib.util
from pathlib import Path

import pytest
import torch

from cogvx.diffusion.guidance import SCALES
from cogvx.diffusion.samplers import SAMPLERS
from cogvx.diffusion.schedule import cumulative_alphas, sampling_steps, timesteps
from cogvx.numerics import SAT

SPEC = importlib.util.spec_from_file_location("sat_oracle", Path(__file__).with_name("sat_oracle.py"))
oracle = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(oracle)

SHIFTS = [1.0, 3.0]
COUNTS = [2, 7, 10, 27, 30, 50, 61, 333]


def sat_steps(config, num_steps):
    return sampling_steps(config, num_steps, SAT.rounding, SAT.moves, SAT.zero_snr)


@pytest.mark.parametrize(("shift", "factor"), [(3.0, 1.00210), (1.0, 1.00126)])
def test_the_rescaling_after_subsampling_stretches_every_alpha_alike(shift, factor, make_config):
    config = make_config(snr_shift_scale=shift)
    alphas = cumulative_alphas(config)
    steps = sat_steps(config, 50)
    assert steps[0].alpha == 0.0 and steps[-1].next_alpha == 1.0
    for step in steps[1:]:
        assert step.alpha / alphas[step.timestep].item() == pytest.approx(factor, abs=5e-6)
        assert step.trained_alpha in alphas.tolist()


def test_the_last_kept_step_keeps_its_alpha(make_config):
    config = make_config(snr_shift_scale=1.0)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert sat_steps(config, 50)[-1].alpha == pytest.approx((1 - betas[:20]).prod().item(), rel=1e-12)


def test_timesteps_are_truncated(make_config):
    assert timesteps(make_config(), 30, "truncated")[:3] == [999, 965, 932]
    assert timesteps(make_config(), 50, "truncated") == list(range(999, 0, -20))
    assert timesteps(make_config(), 1000, "truncated") == list(range(999, -1, -1))


@pytest.mark.parametrize("num_steps", COUNTS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_the_schedule_is_the_oracles(shift, num_steps, make_config):
    steps = sat_steps(make_config(snr_shift_scale=shift), num_steps)
    for step, (timestep, root, after, seen) in zip(steps, oracle.schedule(num_steps, shift), strict=True):
        assert step.timestep == timestep
        ours = step.alpha, step.next_alpha, step.trained_alpha
        assert ours == pytest.approx((root**2, after**2, seen**2), rel=1e-9, abs=1e-15)


def test_one_step_starts_at_pure_noise_and_ends_at_the_clip(make_config):
    (step,) = sat_steps(make_config(), 1)
    assert step == (999, -1, 0.0, 1.0, 0.0)


@pytest.mark.parametrize("num_steps", [2, 7, 30, 50])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m_sde", "dpmpp_2m"])
def test_whole_trajectories_are_the_oracles(name, shift, num_steps, make_config, nonlinear_denoiser):
    start = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    steps = sat_steps(make_config(snr_shift_scale=shift), num_steps)
    ours = SAMPLERS[name](nonlinear_denoiser, start, steps, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    draw = [lambda: torch.randn(start.shape, generator=generator)] if name == "dpmpp_2m_sde" else []
    theirs = getattr(oracle, name)(nonlinear_denoiser, start, num_steps, shift, *draw)
    assert (ours - theirs).norm() / theirs.norm() <= 1e-5


def test_the_numerics_change_what_is_sampled(make_config, nonlinear_denoiser):
    """Each switch of the schedule has an effect of its own, so that the agreement above is no accident."""
    start, config = torch.randn(1, 16, 3, 4, 6), make_config()
    names = {"rounding": "rounded", "moves": "stride", "zero_snr": "all"}
    sat = {name: getattr(SAT, name) for name in names}
    whole = SAMPLERS["ddim"](nonlinear_denoiser, start, sampling_steps(config, 30, **sat))
    for name, other in names.items():
        changed = SAMPLERS["ddim"](nonlinear_denoiser, start, sampling_steps(config, 30, **sat | {name: other}))
        assert (changed - whole).norm() / whole.norm() > 1e-4, name


def test_wave_guidance_is_the_oracles():
    for i, timestep in enumerate(range(999, 0, -20)):
        assert SCALES["wave"](6.0, timestep, i, 50) == pytest.approx(oracle.wave(6.0, timestep), rel=1e-12)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"rounding": "up"}, "rounding is 'up'; valid: 'rounded', 'truncated'"),
        ({"moves": "far"}, "moves is 'far'; valid: 'visited', 'stride'"),
        ({"zero_snr": "none"}, "zero_snr is 'none'; valid: 'visited', 'all'"),
    ],
)
def test_a_choice_that_there_is_not_is_named(choice, message, make_config):
    with pytest.raises(ValueError, match=message):
        sampling_steps(make_config(), 5, **choice)
