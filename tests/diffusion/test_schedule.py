import re
from itertools import pairwise

import pytest
import torch

from cogvx.diffusion.schedule import cumulative_alphas, sampling_steps, timesteps

# Counts at which the oracle's floating-point range grows one timestep too many, the last of them -1.
ORACLE_OVERRUNS = [61, 103, 121, 122, 201]


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (3.0, [0.997454, 0.389054, 0.095328, 0.010839, 0.0]),
        (1.0, [0.999150, 0.652457, 0.241019, 0.032799, 0.0]),
    ],
)
def test_cumulative_alphas_have_the_known_values(make_config, shift, expected):
    alphas = cumulative_alphas(make_config(snr_shift_scale=shift))
    assert alphas.dtype == torch.float64
    assert [round(alphas[t].item(), 6) for t in (0, 250, 500, 750, 999)] == expected
    assert alphas[999].item() == 0.0
    assert (alphas.diff() < 0).all()


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
@pytest.mark.parametrize("changes", [{}, {"snr_shift_scale": 1.0}, {"num_train_timesteps": 500}])
def test_cumulative_alphas_are_the_oracles(make_config, make_oracle, name, changes):
    assert torch.equal(cumulative_alphas(make_config(**changes)), make_oracle(name, **changes).alphas_cumprod)


def test_timesteps_are_trailing_and_rounded(make_config):
    assert timesteps(make_config(), 50) == list(range(999, 0, -20))
    assert timesteps(make_config(), 30)[:3] == [999, 966, 932]
    assert timesteps(make_config(), 1) == [999]


def test_timesteps_are_the_oracles(make_config, make_oracle):
    oracle = make_oracle("CogVideoXDDIMScheduler")
    for num_steps in (1, 2, 3, 6, 7, 16, 30, 49, 50, 51, 100, 333, 512, 999, 1000):
        oracle.set_timesteps(num_steps)
        assert timesteps(make_config(), num_steps) == oracle.timesteps.tolist()


@pytest.mark.parametrize("num_steps", ORACLE_OVERRUNS)
def test_no_count_visits_a_timestep_below_zero(make_config, make_oracle, num_steps):
    oracle = make_oracle("CogVideoXDDIMScheduler")
    oracle.set_timesteps(num_steps)
    assert [*timesteps(make_config(), num_steps), -1] == oracle.timesteps.tolist()


def test_every_count_gives_that_many_falling_timesteps(make_config):
    for num_steps in range(1, 1001):
        visited = timesteps(make_config(), num_steps)
        assert len(visited) == num_steps
        assert visited[0] == 999 and visited[-1] >= 0
        assert all(a > b for a, b in pairwise(visited))


def test_steps_that_divide_end_at_the_finished_clip(make_config):
    steps = sampling_steps(make_config(), 50)
    assert all(now.next_timestep == after.timestep for now, after in pairwise(steps))
    assert steps[0].alpha == 0.0
    assert steps[-1].next_timestep == -1 and steps[-1].next_alpha == 1.0


def test_steps_that_do_not_divide_keep_the_published_stride(make_config):
    alphas = cumulative_alphas(make_config())
    steps = sampling_steps(make_config(), 7)
    assert {step.timestep - step.next_timestep for step in steps} == {142}
    assert steps[-1].next_timestep == 0 and steps[-1].next_alpha == alphas[0]


@pytest.mark.parametrize(
    ("num_steps", "message"),
    [
        (0, "num_inference_steps must be from 1 to 1000, not 0; nearest: 1"),
        (-3, "num_inference_steps must be from 1 to 1000, not -3; nearest: 1"),
        (1001, "num_inference_steps must be from 1 to 1000, not 1001; nearest: 1000"),
        (2.5, "num_inference_steps must be a whole number from 1 to 1000, not 2.5"),
        (True, "num_inference_steps must be a whole number from 1 to 1000, not True"),
    ],
)
def test_bad_step_counts_say_what_is_valid(make_config, num_steps, message):
    for function in (timesteps, sampling_steps):
        with pytest.raises(ValueError) as caught:
            function(make_config(), num_steps)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    "changes", [{"num_train_timesteps": 1}, {"num_train_timesteps": 2**20}, {"snr_shift_scale": 1e-300}]
)
def test_numbers_that_give_no_falling_schedule_are_refused(make_config, changes):
    name, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"{name} {re.escape(str(value))}.* give no falling schedule"):
        cumulative_alphas(make_config(**changes))
