"""The VAE against diffusers', on weights that diffusers saved, and by itself."""

import math

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogvx.config import PRESETS
from cogvx.models import CausalVAE
from cogvx.models.vae import Halos, Posterior, ResidualBlock, decode_chunks, encode_chunks, in_turn
from cogvx_kernels import use_backend
from cogvx_kernels.testing import assert_as_accurate

# Frames of 8N+1, height, width: any multiples of 8.
SIZES = [(1, 8, 8), (9, 16, 24), (17, 24, 16), (25, 8, 40), (33, 16, 16), (41, 8, 8), (49, 16, 8)]


@pytest.fixture(scope="module")
def pair(published):
    return CausalVAE.from_pretrained(published), AutoencoderKLCogVideoX.from_pretrained(published / "vae")


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_computes_what_diffusers_computes(pair, relative_error, size):
    ours, oracle = pair
    video = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5))
    posterior, wanted = ours.encode(video), oracle.encode(video).latent_dist
    assert relative_error(posterior.mode(), wanted.mean) <= 1e-4
    assert relative_error(posterior.logvar, wanted.logvar) <= 1e-4
    decoded = ours.decode(wanted.mean)
    assert decoded.shape == video.shape
    assert relative_error(decoded, oracle.decode(wanted.mean).sample) <= 1e-4


@pytest.mark.parametrize("name", ["2b", "5b"])
def test_presets_have_the_released_tensors(name):
    config = PRESETS[name].vae
    with torch.device("meta"):
        ours, oracle = CausalVAE(config), AutoencoderKLCogVideoX.from_config(config.to_dict())
    assert sum(parameter.numel() for parameter in ours.parameters()) == 215_583_907
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, oracle)]
    assert shapes[0] == shapes[1]


def test_a_frame_changes_no_chunk_before_its_own(pair):
    """GroupNorm sees a whole chunk, so that causality holds from chunk to chunk; within one, up to that norm."""
    vae, _ = pair
    video = torch.randn(1, 3, 25, 8, 8, generator=torch.Generator().manual_seed(6))
    assert encode_chunks(25) == [9, 8, 8]
    for frame, first_touched in ((24, 5), (17, 5), (16, 3), (9, 3), (8, 0)):  # latent frames: 3, 2, 2
        changed = video.clone()
        changed[:, :, frame] += 1.0
        with torch.no_grad():
            difference = (vae.encode(video).mode() - vae.encode(changed).mode()).abs().amax(dim=(0, 1, 3, 4))
        assert (difference[:first_touched] == 0).all()
        assert (difference[first_touched:] > 0).any()


def test_a_latent_changes_no_earlier_chunk_of_video(pair):
    vae, _ = pair
    latents = torch.randn(1, 5, 7, 1, 1, generator=torch.Generator().manual_seed(7))
    assert decode_chunks(7) == [3, 2, 2]
    for latent, first_touched in ((6, 17), (5, 17), (4, 9), (3, 9), (2, 0)):  # frames of video: 9, 8, 8
        changed = latents.clone()
        changed[:, :, latent] += 1.0
        with torch.no_grad():
            difference = (vae.decode(latents) - vae.decode(changed)).abs().amax(dim=(0, 1, 3, 4))
        assert (difference[:first_touched] == 0).all()
        assert (difference[first_touched:] > 0).any()


@torch.no_grad()
def test_convolutions_are_causal_to_the_frame(pair):
    vae, _ = pair
    conv = vae.encoder.conv_in
    x = torch.randn(1, 3, 6 + 2, 8, 8, generator=torch.Generator().manual_seed(8))
    changed = x.clone()
    changed[:, :, 2 + 3] += 1.0  # frame 3; the first two are the halo
    difference = (conv(x, Halos())[0] - conv(changed, Halos())[0]).abs().amax(dim=(0, 1, 3, 4))
    assert (difference[:3] == 0).all() and (difference[3:6] > 0).all()


def test_posterior_of_a_hand_worked_value():
    posterior = Posterior(torch.full((2, 1, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1, 1), math.log(4.0)))
    assert posterior.kl().tolist() == pytest.approx([0.5 * (9 + 4 - 1 - math.log(4.0))] * 2)
    draws = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    noise = torch.randn(2, 1, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(draws[0], 3.0 + 2.0 * noise)
    assert torch.equal(posterior.mode(), posterior.mean)


def test_norms_take_what_the_convolutions_before_them_measured(run_on):
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(ResidualBlock(w, 16, 4).bfloat16() for w in (16, 16, 32, 16))
    blocks[1] = ResidualBlock(16, 32, 4).bfloat16()  # whose shortcut is added after its convolution measured
    x, convolution = torch.randn(1, 16, 2, 9, 20).bfloat16(), blocks[0].conv1.conv
    run_on("causal_conv3d_moments", "cuda", x.repeat(1, 1, 2, 1, 1), convolution.weight, convolution.bias, None)
    taken = []
    for block in blocks:
        for norm in (block.norm1, block.norm2):
            norm.register_forward_pre_hook(lambda _, args: taken.append(args[3] is not None))

    def run(x):
        halos, moments = Halos(), None
        for block, for_norm in in_turn(blocks, for_norm=False):
            x, moments = block(x, None, halos, moments, for_norm)
        return x, moments

    with torch.no_grad():
        with use_backend("cuda"):
            found, moments = run(x)
        assert moments is None and taken == [False, True, True, True, False, True, False, True]
        taken.clear()
        with use_backend("reference"):
            eager = run(x)[0]
            blocks.double()
            exact = run(x.double())[0]
    assert not any(taken)
    assert_as_accurate(found, eager, exact)
