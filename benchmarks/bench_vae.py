"""The decoder of the published VAE beside diffusers' in eager mode: time in turns, and what tensors hold at most."""

from statistics import median
from time import perf_counter as now

import cost
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from timing import DEVICE, DEVICE_NAME, shares, synchronize

from cogvx.config import PRESETS
from cogvx.machine import peak_of_tensors
from cogvx.models import CausalVAE
from cogvx_kernels.testing import assert_as_accurate

pytestmark = pytest.mark.products

LATENTS = (1, 16, 3, 60, 90) if DEVICE == "cuda" else (1, 16, 3, 15, 22)  # 9 x 480 x 720, 9 x 120 x 176
ROUNDS = 20 if DEVICE == "cuda" else 5


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def models(request):
    torch.manual_seed(0)
    config = PRESETS["2b"].vae
    ours, oracle = CausalVAE(config).eval(), AutoencoderKLCogVideoX.from_config(config.to_dict()).eval()
    oracle.load_state_dict(ours.state_dict())
    latents = torch.randn(LATENTS)
    with torch.no_grad():
        exact = oracle.to(DEVICE).decode(latents.to(DEVICE)).sample
    return (*(model.to(DEVICE, request.param) for model in (ours, oracle)), latents.to(DEVICE, request.param), exact)


@torch.no_grad()
def test_decode(benchmark, row, models):
    ours, oracle, latents, exact = models

    def decode() -> torch.Tensor:
        y = ours.decode(latents)
        synchronize()
        return y

    def decode_with_diffusers() -> torch.Tensor:
        y = oracle.decode(latents).sample
        synchronize()
        return y

    y, eager = decode(), decode_with_diffusers()
    if latents.dtype == torch.float32:  # nothing here is more exact: in float64 this decode takes minutes on a CPU
        assert (y - eager).norm() <= 1e-4 * eager.norm()
    else:
        assert_as_accurate(y, eager, exact.double(), what=f"decoded in {latents.dtype}")
    peak, theirs = (peak_of_tensors(call, latents.device) for call in (decode, decode_with_diffusers))
    assert peak <= theirs / 2, f"{peak / 1e6:.0f} MB held, diffusers holds {theirs / 1e6:.0f} MB"

    seconds = []

    def setup() -> None:
        before = now()
        decode_with_diffusers()
        seconds.append(now() - before)

    benchmark.group = f"decode {list(exact.shape)} {latents.dtype} ({DEVICE_NAME})"
    benchmark.pedantic(decode, setup=setup, rounds=ROUNDS)
    dtype, seconds_of_ours = latents.dtype, benchmark.stats.stats.median
    with torch.device("meta"):
        least = cost.of_model(lambda: CausalVAE(ours.config).to(dtype).decode(torch.empty(LATENTS, dtype=dtype)))
    info = shares(least, seconds_of_ours, dtype) | {
        "diffusers, seconds": round(median(seconds), 4),
        "times as fast": round(median(seconds) / seconds_of_ours, 3),
        "peak, MB": round(peak / 1e6, 1),
        "diffusers' peak, MB": round(theirs / 1e6, 1),
    }
    benchmark.extra_info |= info
    row(
        benchmark.group,
        "ours",
        seconds=f"{seconds_of_ours:.3f}",
        **{key: f"{value:.4g}" for key, value in info.items()},
    )
