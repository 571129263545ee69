"""The published schedule, ours and as the oracle's schedulers are built from it."""

import math

import pytest
import torch

from cogvx.config import ScheduleConfig
from cogvx.diffusion.schedule import cumulative_alphas

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


@pytest.fixture
def nonlinear_denoiser():
    """A random function of latents, [B, 16, T, H, W], and timestep, as bounded as a velocity is."""
    mix = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)) / 4

    def denoise(latents, timestep, step_index):
        mixed = torch.einsum("dc,bcthw->bdthw", mix, latents)
        return torch.tanh(1.5 * mixed + math.cos(timestep / 100)) + 0.3 * torch.sin(3 * latents)

    return denoise


@pytest.fixture
def gaussian_denoiser():
    """`gaussian_denoiser(config, std)`: the exact velocity where every clip value is an independent N(0.7, std^2)."""

    def build(config, std):
        alphas = cumulative_alphas(config).tolist()

        def denoise(x, timestep, step_index):
            alpha = alphas[timestep]
            variance = alpha * std**2 + 1 - alpha
            x0 = 0.7 + math.sqrt(alpha) * std**2 / variance * (x - math.sqrt(alpha) * 0.7)
            return (math.sqrt(alpha) * x - x0) / math.sqrt(1 - alpha)

        return denoise

    return build
