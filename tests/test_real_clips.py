"""Every task on a real clip, through small random models: sizes, what may depend on what, and no seams."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvx import Pipeline
from cogvx.data.image import fitted
from cogvx.data.pixels import to_tensor
from cogvx.data.video import read_video
from cogvx.extend import extend
from cogvx.invert import invert, reconstruct

CLIP = Path(__file__).resolve().parents[2] / "shared" / "clips" / "t2v_1.mp4"
PROMPT = "a red circle moves left"
QUICK = {"num_inference_steps": 2, "seed": 3, "progress": False}

pytestmark = pytest.mark.skipif(not CLIP.is_file(), reason=f"{CLIP} is not there")


@pytest.fixture(scope="module")
def video():
    return fitted(read_video(CLIP)[0][:33], 48, 64)


@pytest.fixture(scope="module")
def load(small_checkpoint):
    return cache(lambda kind: Pipeline.from_pretrained(small_checkpoint(kind), numerics="diffusers"))


def changes(frames):
    """How much each frame differs from the one before, as a mean over pixels."""
    return np.abs(np.diff(frames.astype(int), axis=0)).mean((1, 2, 3))


@pytest.mark.parametrize(("kind", "given"), [
    ("5b-i2v", {"image": 0}), ("1.5-5b-i2v", {"image": 0}), ("5b-i2v", {"image": 0, "last_image": 16}),
    ("1.5-5b-i2v", {"image": 0, "last_image": 16}),
])  # fmt: skip
def test_first_and_last_frames(kind, given, load, video):
    pictures = {name: video[at] for name, at in given.items()}
    clip = load(kind)(PROMPT, **pictures, num_frames=17, **QUICK)
    assert clip.frames.shape == (17, 48, 64, 3) and list(clip.metadata["inputs_sha256"]) == list(given)
    other = load(kind)(PROMPT, **pictures | {list(given)[-1]: video[32]}, num_frames=17, **QUICK)
    assert not np.array_equal(clip.frames, other.frames)


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5-5b"])
def test_the_weaker_the_nearer_to_the_video(kind, load, video):
    settings = QUICK | {"num_inference_steps": 4}
    near, far = (load(kind)(PROMPT, video=video[:17], strength=s, **settings).frames for s in (0.25, 1.0))
    assert near.shape == far.shape == (17, 48, 64, 3)
    through = load(kind).vae  # a random VAE is far from the video; what it makes of it is what can be near
    with torch.inference_mode():
        wanted = load(kind).decode(through.encode(to_tensor(video[:17])).mode() * through.config.scaling_factor)[0]
    off = [np.abs(frames.astype(int) - wanted).mean() for frames in (near, far)]
    assert off[0] < off[1]


def test_inside_the_mask_alone_changes(load, video):
    mask = np.zeros((1, 48, 64), bool)
    mask[:, 16:40, 24:56] = True
    clip = load("5b")(PROMPT, video=video[:17], mask=mask, strength=1.0, **QUICK)
    assert np.array_equal(clip.frames[:, ~mask[0]], video[:17, ~mask[0]])
    assert (clip.frames[:, mask[0]] != video[:17, mask[0]]).mean() > 0.9


@pytest.mark.parametrize(("kind", "count"), [("5b", 17 + 2 * 8), ("5b-i2v", 17 + 2 * 16)])
def test_a_clip_that_goes_on_keeps_its_frames_and_what_comes_later_changes_no_earlier_piece(kind, count, load, video):
    clip = extend(load(kind), video[:17], PROMPT, num_pieces=2, num_frames=17, **QUICK)
    assert clip.frames.shape == (count, 48, 64, 3) and np.array_equal(clip.frames[:17], video[:17])
    shorter = extend(load(kind), video[:17], PROMPT, num_frames=17, **QUICK)
    assert np.array_equal(clip.frames[: len(shorter.frames)], shorter.frames)


@pytest.mark.parametrize("kind", ["2b", "5b-i2v", "1.5-5b"])
def test_inversion_has_the_videos_size_and_finite_noise(kind, load, video):
    inversion = invert(load(kind), video[:17], num_inference_steps=2, progress=False)
    assert torch.isfinite(inversion.latents).all()
    assert reconstruct(load(kind), inversion, progress=False).frames.shape == (17, 48, 64, 3)


@pytest.mark.parametrize("kind", ["2b", "1.5-5b"])
def test_the_vae_never_looks_ahead(kind, load, video):
    vae, changed = load(kind).vae, video.copy()
    changed[17:] = 255 - changed[17:]
    with torch.inference_mode():
        one, other = (vae.encode(to_tensor(frames)).mode() for frames in (video, changed))
        assert torch.equal(one[:, :, :5], other[:, :, :5]) and not torch.equal(one[:, :, 5:], other[:, :, 5:])
        mixed = torch.cat([one[:, :, :5], other[:, :, 5:]], 2)
        frames = [vae.decode(z) for z in (one, torch.cat([one[:, :, :5], -one[:, :, 5:]], 2))]
    assert torch.equal(mixed, other)
    assert torch.equal(*(x[:, :, :17] for x in frames)) and not torch.equal(*(x[:, :, 17:] for x in frames))


@pytest.mark.parametrize(("kind", "longer"), [("2b", "windows"), ("5b", "windows"), ("5b", "riflex")])
def test_longer_clips_have_no_seams(kind, longer, load, video):
    settings = {**QUICK, "num_inference_steps": 4, "strength": 0.5}
    short = load(kind)(PROMPT, video=video[:17], **settings).frames
    long = load(kind)(PROMPT, video=video, num_frames=33, longer=longer, **settings).frames
    assert long.shape == (33, 48, 64, 3)
    assert changes(long).max() < 1.5 * changes(short).max(), (changes(long), changes(short))
