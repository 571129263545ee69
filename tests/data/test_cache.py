import hashlib
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cogvx.config import VAEConfig
from cogvx.data.cache import Cache, Loaded, images_of, latents_of
from cogvx.data.clips import find_clips
from cogvx.data.pixels import to_tensor
from cogvx.data.video import write_video
from cogvx.models.vae import CausalVAE


def test_what_was_computed_is_read_again_unless_its_key_or_the_file_has_changed(tmp_path):
    calls = []

    def compute() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"x": torch.full((2,), float(len(calls)))}

    cache = Cache(tmp_path / "cache")
    assert cache.get("text", {"caption": "a"}, compute)["x"][0] == 1
    assert Cache(tmp_path / "cache").get("text", {"caption": "a"}, compute)["x"][0] == 1
    assert cache.get("text", {"caption": "b"}, compute)["x"][0] == 2
    assert cache.get("latents", {"caption": "a"}, compute)["x"][0] == 3
    file = min((tmp_path / "cache").glob("latents-*"))
    file.write_bytes(file.read_bytes()[:-3])
    assert cache.get("latents", {"caption": "a"}, compute)["x"][0] == 4
    assert cache.computed == 4


def test_a_clip_is_encoded_in_eights_or_whole_which_are_kept_apart(tmp_path):
    torch.manual_seed(0)
    vae = CausalVAE(VAEConfig(block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2)).eval()
    frames = np.random.default_rng(0).integers(0, 256, (17, 16, 16, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, 8)
    (clip,) = find_clips(tmp_path, (16, 16), captions=False).clips
    pixels, loaded, made = to_tensor(clip.read()[None]), Loaded(lambda: vae, torch.float32), []
    for whole, chunks in ((False, None), (True, [17])):
        made.append(latents_of(Cache(tmp_path / "cache"), clip, loaded, "hash", whole)[0])
        assert torch.equal(made[-1], vae.encode(pixels, chunks).mean[0])
    assert not torch.equal(*made)
    # What was encoded in eights keeps the name that it had before there was a choice.
    key = {"clip": clip.sha256, "dtype": "torch.float32", "num_frames": 17, "vae": "hash"}
    name = f"latents-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.safetensors"
    assert torch.equal(load_file(tmp_path / "cache" / name)["mean"], made[0])


def test_an_image_is_encoded_with_the_published_noise_once_for_all_runs(tmp_path):
    """The noise is that of the paper, its draws are independent, and they follow from the clip alone."""
    torch.manual_seed(0)
    vae, pixels = CausalVAE(VAEConfig(block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2)).eval(), []
    vae.encoder.register_forward_pre_hook(lambda module, given: pixels.append(given[0]))
    for name, brightness in (("a", 100), ("b", 101)):
        write_video(tmp_path / f"{name}.mp4", np.full((9, 16, 16, 3), brightness, dtype=np.uint8), 8)
    a, b = find_clips(tmp_path, (16, 16), captions=False).clips
    loaded = Loaded(lambda: vae, torch.float32)
    mean, std = images_of(Cache(tmp_path / "one"), a, loaded, "hash", 64)
    assert mean.shape == std.shape == (64, 16, 2, 2) and len(pixels) == 64
    noise = torch.cat(pixels)[:, :, 0] - to_tensor(a.read()[:1])[:, :, 0]  # [64, 3, 16, 16]
    sigmas = noise.flatten(1).std(1).log()
    assert sigmas.mean().item() == pytest.approx(-3.0, abs=0.19)  # three standard deviations: 0.5 / sqrt(64) each
    assert sigmas.std().item() == pytest.approx(0.5, abs=0.14)
    unit = noise.flatten(1) / noise.flatten(1).norm(dim=1, keepdim=True)
    assert (unit @ unit.T - torch.eye(64)).abs().max() < 6 / math.sqrt(3 * 16 * 16)
    assert torch.equal(images_of(Cache(tmp_path / "two"), a, loaded, "hash", 64)[0], mean)
    images_of(Cache(tmp_path / "one"), b, loaded, "hash", 1)
    assert not torch.allclose(pixels[-1] - pixels[-1].mean(), pixels[0] - pixels[0].mean(), atol=0.01)
    none = Loaded(lambda: pytest.fail("a model was loaded"), torch.float32)
    assert torch.equal(images_of(Cache(tmp_path / "one"), a, none, "hash", 64)[1], std)
    clean = images_of(Cache(tmp_path / "one"), a, loaded, "hash", 0)[0]
    wanted = vae.encode(to_tensor(a.read()[:1])).mean[:, :, 0]
    assert clean.shape == (1, 16, 2, 2) and torch.equal(clean, wanted)
