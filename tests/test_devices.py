"""The models on every device that is here, with the embedded checkpoint: as exact as plain PyTorch there.

It needs no more than torch, safetensors and transformers; diffusers joins where it is installed.
"""

import pytest
import torch

from cogvx.config import PRESETS
from cogvx.diffusion.guidance import guide
from cogvx.diffusion.samplers import ddim
from cogvx.diffusion.schedule import sampling_steps
from cogvx.models import CausalVAE, ExpertTransformer
from cogvx.models.checkpoint import TINY
from cogvx_kernels import use_backend
from cogvx_kernels.testing import assert_as_accurate, devices

pytestmark = pytest.mark.skipif(not (TINY / "transformer").is_dir(), reason=f"{TINY} holds no checkpoint")

each_device = pytest.mark.parametrize("device", devices())
# Of 16 bits a CPU has fast products in bfloat16 alone.
each_dtype_there = pytest.mark.parametrize(
    ("device", "dtype"),
    [(device, dtype) for device in devices() for dtype in (torch.float32, torch.bfloat16, torch.float16)
     if device != "cpu" or dtype != torch.float16],
    ids=str,
)  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(model: ExpertTransformer, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    config = model.config
    latents = drawn(2, config.in_channels, 5, config.sample_height, config.sample_width)
    text = drawn(2, config.max_text_seq_length, config.text_embed_dim, seed=1)
    return latents.to(device, dtype), text.to(device, dtype), torch.tensor([999, 37], device=device)


def check(model, call, given, dtype: torch.dtype) -> None:
    """Live backends against the reference in the same dtype, and both against float64 on the CPU."""
    with torch.no_grad():
        y = call(model, *given)
        with use_backend("reference"):
            eager = call(model, *given)
            exact = call(model.double().cpu(), *(x.double().cpu() if x.is_floating_point() else x.cpu() for x in given))
    assert_as_accurate(y.cpu(), eager.cpu(), exact, factor=3.0, what=f"{type(model).__name__} in {dtype}")


@each_dtype_there
def test_the_transformer(device, dtype):
    model = ExpertTransformer.from_pretrained("tiny", dtype=dtype, device=device).eval()
    check(model, lambda m, *given: m(*given), inputs(model, device, dtype), dtype)


@each_dtype_there
@pytest.mark.parametrize("half", ["encode", "decode"])
def test_the_vae(device, dtype, half):
    model = CausalVAE.from_pretrained("tiny", dtype=dtype, device=device).eval()
    if half == "encode":
        given, call = drawn(1, 3, 9, 32, 32), lambda m, x: m.encode(x).mode()
    else:
        given, call = drawn(1, 16, 3, 4, 4), lambda m, x: m.decode(x)
    check(model, call, (given.to(device, dtype),), dtype)


@each_device
def test_sampling_takes_the_same_way_everywhere(device):
    """A few guided steps in fp32 end where those of the reference in float64 on the CPU do."""
    steps = sampling_steps(PRESETS["tiny"].schedule, 4)

    def sample(where: str, dtype: torch.dtype) -> torch.Tensor:
        model = ExpertTransformer.from_pretrained("tiny", dtype=dtype, device=where).eval()
        _, text, _ = inputs(model, where, dtype)
        table = model.tabulate([step.timestep for step in steps])

        def denoise(x: torch.Tensor, timestep: int, index: int) -> torch.Tensor:
            given = torch.full((2,), timestep, device=where)
            return guide(*model(torch.cat([x, x]).to(dtype), text, given, table.at(timestep)).chunk(2), 6.0)

        return ddim(denoise, drawn(1, model.config.in_channels, 5, 8, 8, seed=2).to(where), steps).cpu()

    with torch.no_grad():
        found = sample(device, torch.float32)
        with use_backend("reference"):
            exact = sample("cpu", torch.float64)
    assert ((found - exact).norm() / exact.norm()).item() <= 1e-4


@each_device
@torch.no_grad()
def test_diffusers_computes_the_same_there(device):
    diffusers = pytest.importorskip("diffusers")
    ours = ExpertTransformer.from_pretrained("tiny", device=device).float().eval()
    theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(TINY / "transformer").to(device).eval()
    latents, text, timestep = inputs(ours, device, torch.float32)
    rope = ours.positions((5, latents.shape[3] // 2, latents.shape[4] // 2), text.shape[1], latents.device)[1]
    other = theirs(latents.transpose(1, 2), text, timestep, image_rotary_emb=rope, return_dict=False)[0]
    y = ours(latents, text, timestep)
    assert ((y - other.transpose(1, 2)).norm() / y.norm()).item() <= 1e-4
    ours = CausalVAE.from_pretrained("tiny", device=device).float().eval()
    theirs = diffusers.AutoencoderKLCogVideoX.from_pretrained(TINY / "vae").to(device).eval()
    z = drawn(1, 16, 3, 4, 4).to(device)
    assert ((ours.decode(z) - theirs.decode(z).sample).norm() / ours.decode(z).norm()).item() <= 1e-3
