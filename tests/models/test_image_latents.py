"""Image latents against those of diffusers' image-to-video pipeline, and their parts by themselves."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
)

from cogvx.config import PRESETS
from cogvx.models import CausalVAE
from cogvx.models.image_latents import (
    SCALINGS,
    add_noise,
    default_scaling,
    drop_image,
    encode_image,
    in_frames,
    with_image,
)


@pytest.fixture(scope="module")
def vae(published):
    return CausalVAE.from_pretrained(published)


def pictures(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
@pytest.mark.parametrize("invert", [False, True], ids=["multiplied", "divided"])
@pytest.mark.parametrize(
    ("kind", "num_frames", "num_latents", "images_at"),
    [
        ("5b-i2v", 9, 3, [0]),
        ("1.5-5b-i2v", 13, 4, [0]),  # as its pipeline calls, which fills up first
        ("1.5-5b-i2v", 9, 4, [0, 1]),  # an odd count, which repeats the image
    ],
)
def test_equal_those_of_diffusers(published, vae, relative_error, kind, num_frames, num_latents, images_at, invert):
    oracle = CogVideoXImageToVideoPipeline(
        None, None,
        AutoencoderKLCogVideoX.from_pretrained(published / "vae", invert_scale_latents=invert),
        CogVideoXTransformer3DModel.from_pretrained(published / kind),
        CogVideoXDDIMScheduler(),
    )  # fmt: skip
    noise, wanted = oracle.prepare_latents(
        pictures(), 2, 5, num_frames, 16, 24, torch.float32, torch.device("cpu"), generators(1, 2)
    )
    scaling = default_scaling(replace(vae.config, invert_scale_latents=invert))
    drawn_from = generators(1, 2)
    latent = encode_image(vae, pictures(), scaling, drawn_from)
    clip = in_frames(dict.fromkeys(images_at, latent), num_latents)
    assert relative_error(clip, wanted.transpose(1, 2)) <= 1e-5
    # The same generators draw the noise next, and the transformer takes noise first.
    ours = torch.cat([torch.randn(1, num_latents, 5, 2, 3, generator=g) for g in drawn_from]).transpose(1, 2)
    taken = with_image(ours, clip)
    assert relative_error(taken, torch.cat([noise, wanted], dim=2).transpose(1, 2)) <= 1e-5


@torch.no_grad()
def test_scalings_and_the_mode(vae):
    mode = vae.encode(pictures()[:, :, None]).mode()
    factor = vae.config.scaling_factor
    for scaling, wanted in zip(SCALINGS, (mode * factor, mode / factor, mode), strict=True):
        torch.testing.assert_close(encode_image(vae, pictures(), scaling), wanted)
    assert torch.equal(encode_image(vae, pictures(), "unscaled")[1:], encode_image(vae, pictures()[1:], "unscaled"))


def test_released_models_scale_as_diffusers_does():
    scalings = {name: default_scaling(preset.vae) for name, preset in PRESETS.items()}
    assert {name for name, scaling in scalings.items() if scaling == "divided"} == {"1.5-5b", "1.5-5b-i2v"}


def test_images_stand_in_their_frames_alone():
    first, last = torch.full((1, 5, 1, 2, 3), 2.0), torch.full((1, 5, 1, 2, 3), 3.0)
    clip = in_frames({0: first, -1: last}, 4)
    assert clip.shape == (1, 5, 4, 2, 3)
    assert clip.amax(dim=(0, 1, 3, 4)).tolist() == clip.amin(dim=(0, 1, 3, 4)).tolist() == [2.0, 0.0, 0.0, 3.0]
    with pytest.raises(ValueError, match="latents have frame 4, which is outside the clip; it has 4 latent frames"):
        in_frames({4: first}, 4)
    with pytest.raises(ValueError, match="latents have frame -1, which is taken already"):
        in_frames({0: first, -1: last}, 1)


def test_guidance_repeats_the_image():
    noisy, image = torch.randn(4, 5, 2, 2, 3), torch.randn(2, 5, 2, 2, 3)
    taken = with_image(noisy, image)
    assert torch.equal(taken[:, :5], noisy) and torch.equal(taken[:, 5:], torch.cat([image, image]))
    with pytest.raises(ValueError, match=r"image has shape \[2, 5, 2, 2, 3\], which does not fit latents of \[3, 5"):
        with_image(noisy[:3], image)
    with pytest.raises(ValueError, match="does not fit"):
        with_image(noisy[:, :, :1], image)


def test_noise_of_training_has_the_published_sigmas():
    images = torch.zeros(1000, 3, 8, 8)
    noisy = add_noise(images, *generators(5))
    logs = noisy.flatten(1).std(1).log()
    # 192 pixels an image measure log sigma with a spread of 1 / sqrt(2 * 192) = 0.05 beside the 0.5.
    assert logs.mean().item() == pytest.approx(-3.0, abs=0.06)
    assert logs.std().item() == pytest.approx(math.hypot(0.5, 0.05), abs=0.04)
    assert torch.equal(noisy, add_noise(images, *generators(5)))
    assert add_noise(images.bfloat16(), *generators(5)).dtype == torch.bfloat16


def test_an_image_is_dropped_for_the_whole_batch():
    latents, (generator,) = torch.ones(2, 1), generators(6)
    kept = torch.stack([drop_image(latents, 0.25, generator) for _ in range(1000)])
    assert (kept[:, 0] == kept[:, 1]).all()
    assert kept.mean().item() == pytest.approx(0.75, abs=0.05)
    assert drop_image(latents, 0.0, generator).all() and not drop_image(latents, 1.0, generator).any()
    with pytest.raises(ValueError, match=r"probability is 1\.5; it must be from 0 to 1"):
        drop_image(latents, 1.5, generator)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": torch.zeros(3, 16, 24)}, r"images have shape \[3, 16, 24\]; it must be \[B, 3, H, W\]"),
        ({"images": torch.zeros(1, 4, 16, 24)}, r"images have shape \[1, 4, 16, 24\]"),
        ({"images": torch.zeros(1, 3, 20, 24)}, "images have height 20; it must be a multiple of 8, the nearest is 16"),
        ({"scaling": "halved"}, "scaling is 'halved'; it must be one of multiplied, divided, unscaled"),
        ({"generators": generators(1)}, "generators has 1 entries for 2 images; give one an image"),
    ],
)
def test_wrong_arguments_are_named(vae, changed, message):
    with pytest.raises(ValueError, match=message):
        encode_image(vae, **({"images": pictures(), "scaling": "multiplied"} | changed))
