import pytest
import torch

from cogvx.diffusion.loss import (
    add_noise,
    clip_from_velocity,
    draw_timesteps,
    spread_timesteps,
    velocity,
    velocity_loss,
)
from cogvx.diffusion.schedule import cumulative_alphas

TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 4, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.fixture
def alpha(make_config):
    return cumulative_alphas(make_config())[TIMESTEPS]


def test_noise_and_velocity_are_the_oracles(sample, alpha, make_oracle):
    clip, noise, _ = sample
    oracle = make_oracle("CogVideoXDDIMScheduler")
    torch.testing.assert_close(add_noise(clip, noise, alpha), oracle.add_noise(clip, noise, TIMESTEPS))
    torch.testing.assert_close(velocity(clip, noise, alpha), oracle.get_velocity(clip, noise, TIMESTEPS))


def test_at_zero_snr_the_noisy_clip_is_noise_and_the_velocity_minus_the_clip(sample, alpha):
    clip, noise, _ = sample
    assert torch.equal(add_noise(clip, noise, alpha)[-1], noise[-1])
    assert torch.equal(velocity(clip, noise, alpha)[-1], -clip[-1])


def test_the_true_velocity_gives_the_clip_back(sample, alpha):
    clip, noise, _ = sample
    back = clip_from_velocity(add_noise(clip, noise, alpha), velocity(clip, noise, alpha), alpha)
    torch.testing.assert_close(back, clip)


def test_loss_is_the_weighted_error_of_the_clip(sample, alpha):
    clip, noise, predicted = sample
    x0 = clip_from_velocity(add_noise(clip, noise, alpha), predicted, alpha)
    weighted = ((x0 - clip).square() / (1 - alpha).view(-1, 1, 1, 1, 1)).flatten(1).mean(1)
    loss = velocity_loss(predicted, clip, noise, alpha)
    assert loss.shape == (6,) and loss.dtype == torch.float32
    torch.testing.assert_close(loss, weighted.float())


def test_loss_of_a_half_precision_prediction_is_computed_in_fp32(sample, alpha):
    clip, noise, predicted = (x.bfloat16() for x in sample)
    expected = velocity_loss(predicted.float(), clip.float(), noise.float(), alpha)
    assert torch.equal(velocity_loss(predicted, clip, noise, alpha), expected)


def test_loss_is_zero_for_the_true_velocity_alone(sample, alpha):
    clip, noise, _ = (x.float() for x in sample)
    assert not velocity_loss(velocity(clip, noise, alpha), clip, noise, alpha).any()
    assert (velocity_loss(-velocity(clip, noise, alpha), clip, noise, alpha) > 1).all()


def test_timesteps_cover_the_range_uniformly():
    drawn = draw_timesteps(100_000, 1000, torch.Generator().manual_seed(0))
    assert drawn.min() == 0 and drawn.max() == 999
    counts = torch.bincount(drawn // 100, minlength=10)
    assert ((counts - 10_000).abs() < 500).all()


@pytest.mark.parametrize(("count", "num_ranks"), [(1, 1), (8, 1), (1, 2), (3, 3), (1, 7), (4, 8), (1, 1500)])
def test_spread_timesteps_cover_the_range_evenly_at_any_world_size(count, num_ranks):
    generators = [torch.Generator().manual_seed(rank) for rank in range(num_ranks)]
    drawn, total = [], count * num_ranks
    for _ in range(-(-5000 // total)):
        each = [spread_timesteps(count, 100, g, rank, num_ranks) for rank, g in enumerate(generators)]
        drawn.append(torch.stack(each, 1).flatten())  # the i-th of every rank, then the next of every rank
    drawn = torch.stack(drawn)
    places = torch.arange(total) * 100 / total
    assert (drawn >= places.floor()).all() and (drawn <= places + 100 / total).all()  # each within its interval
    # Pearson's statistic of uniform draws has a mean of 99 and a deviation of 14; less where draws are spread.
    expected = drawn.numel() / 100
    counts = torch.bincount(drawn.flatten(), minlength=100)
    assert len(counts) == 100
    assert ((counts - expected).square() / expected).sum() < 99 + 4 * 14


def test_every_timestep_is_exactly_as_likely():
    """Ten timesteps over three ranks; were those cut 3, 3 and 4, the last four would come more rarely."""
    drawn = torch.cat([spread_timesteps(20_000, 10, torch.Generator().manual_seed(r), r, 3) for r in range(3)])
    assert (torch.bincount(drawn, minlength=10) - 6000).abs().max() <= 1


def test_spread_timesteps_steady_the_loss():
    """Of losses by timestep as published for 100, 300, ... 900 (0.22, 0.13, 0.12, 0.13, 0.16), the mean of eight."""
    t = torch.arange(1000) / 1000
    loss = 0.115 + 1.2 * (0.4 - t).clamp(min=0) ** 2 + 0.3 * (t - 0.5).clamp(min=0) ** 2
    generator = torch.Generator().manual_seed(0)
    plain, spread = (torch.stack([loss[draw(8, 1000, generator)].mean() for _ in range(500)])
                     for draw in (draw_timesteps, spread_timesteps))  # fmt: skip
    assert (plain.mean() - spread.mean()).abs() < 5 * plain.std() / 500**0.5
    assert spread.var() < 0.15 * plain.var()


@pytest.mark.parametrize(
    ("rank", "num_ranks", "message"),
    [
        (3, 3, "rank must be from 0 to 2, not 3"),
        (-1, 3, "rank must be from 0 to 2, not -1"),
        (0, 0, "num_ranks must be at least 1, not 0"),
    ],
)
def test_bad_ranks_are_named(rank, num_ranks, message):
    with pytest.raises(ValueError, match=message):
        spread_timesteps(1, 1000, None, rank, num_ranks)
