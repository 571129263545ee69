import math

import pytest
import torch

from cogvx.diffusion.guidance import SCALES, guide

TIMESTEPS = list(range(999, 0, -20))


def scales(name, scale=6.0):
    return [SCALES[name](scale, t, i, len(TIMESTEPS)) for i, t in enumerate(TIMESTEPS)]


def test_guidance_extrapolates_from_null_to_prompted():
    null, prompted = torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.0])
    assert guide(null, prompted, 6.0).tolist() == [7.0, 10.0]
    assert torch.equal(guide(null, prompted, 1.0), prompted)
    assert torch.equal(guide(null, prompted, 0.0), null)


def test_constant_is_the_scale_at_every_step():
    assert scales("constant") == [6.0] * 50


def test_wave_is_the_published_sequence():
    assert [round(scale, 2) for scale in scales("wave")[:7]] == [2.29, 2.54, 6.97, 6.42, 2.79, 4.27, 1.04]
    assert all(1 <= scale <= 7 for scale in scales("wave"))


def test_wave_is_the_oracles_formula():
    for t, ours in zip(TIMESTEPS, scales("wave"), strict=True):
        assert ours == pytest.approx(1 + 6.0 * ((1 - math.cos(math.pi * ((50 - t) / 50) ** 5.0)) / 2), rel=1e-12)


def test_cosine_stays_at_one_and_then_rises():
    sequence = scales("cosine")
    assert [round(scale, 1) for scale in sequence[:24]] == [1.0] * 24
    assert round(sequence[-1], 2) == 6.86
    assert sequence == sorted(sequence)
