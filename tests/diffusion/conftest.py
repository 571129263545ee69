"""The published schedule, ours and as the oracle's schedulers are built from it."""

import pytest

from cogvx.config import ScheduleConfig

FIXED = {
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "clip_sample": False,
}
NUMBERS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "snr_shift_scale": 3.0}


@pytest.fixture
def make_config():
    return lambda **changes: ScheduleConfig(**NUMBERS | changes)


@pytest.fixture
def make_oracle():
    diffusers = pytest.importorskip("diffusers")
    return lambda name, **changes: getattr(diffusers, name)(**FIXED | NUMBERS | changes)
