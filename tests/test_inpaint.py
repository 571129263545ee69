"""A video made anew inside a mask: what is outside of it stays, pixel for pixel, and in latents at every step."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from cogvx import Pipeline
from cogvx.data.shapes import parse, render
from cogvx.data.video import read_video, write_video
from cogvx.models.checkpoint import TINY
from cogvx.settings import SettingsError
from cogvx.start import latent_mask, video_latents

PROMPT = "a red circle moves left"
QUICK = {"num_inference_steps": 3, "seed": 3, "progress": False}


def noise(num_frames=17, height=48, width=64):
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), np.uint8)


def right_half(num_frames=1, height=48, width=64):
    mask = np.zeros((num_frames, height, width), bool)
    mask[:, :, width // 2 :] = True
    return mask


@pytest.fixture(scope="module")
def pipeline(small_checkpoint):
    return Pipeline.from_pretrained(small_checkpoint("5b"), numerics="diffusers")


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m_sde", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("kind", ["2b", "1.5-5b", "5b-i2v"])
def test_inside_changes_and_outside_stays(kind, sampler, small_checkpoint):
    pipeline = Pipeline.from_pretrained(small_checkpoint(kind), numerics="diffusers")
    clip = pipeline(PROMPT, video=noise(), mask=right_half(), sampler=sampler, **QUICK)
    assert np.array_equal(clip.frames[:, :, :32], noise()[:, :, :32])
    assert (clip.frames[:, :, 32:] != noise()[:, :, 32:]).mean() > 0.9
    assert list(clip.metadata["inputs_sha256"]) == ["video", "mask"]


def test_outside_the_latents_are_the_videos_at_the_end_and_as_noisy_as_the_step_on_the_way(pipeline):
    seen = []
    pipeline(PROMPT, video=noise(), mask=right_half(), strength=1.0, **QUICK,
             callback_on_step_end=lambda p, i, t, tensors: seen.append(tensors["latents"].clone()))  # fmt: skip
    from cogvx.inputs import Inputs

    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        clip = video_latents(Inputs(video=noise()), 5, pipeline.vae, pipeline.numerics, [generator])
    assert torch.equal(seen[-1][..., :4], clip[..., :4]) and not torch.equal(seen[-1][..., 4:], clip[..., 4:])
    left = seen[0][..., :4] - clip[..., :4] * pipeline.steps(3)[0].next_alpha ** 0.5
    assert left.std().item() == pytest.approx((1 - pipeline.steps(3)[0].next_alpha) ** 0.5, rel=0.1)


def test_a_mask_may_move(pipeline):
    mask = np.zeros((17, 48, 64), bool)
    mask[9:] = True
    clip = pipeline(PROMPT, video=noise(), mask=mask, **QUICK)
    assert np.array_equal(clip.frames[:9], noise()[:9]) and (clip.frames[9:] != noise()[9:]).mean() > 0.9


def test_masks_from_files_arrays_and_pillow_are_the_same(pipeline, tmp_path):
    levels = np.where(right_half()[0], 255, 0).astype(np.uint8)
    Image.fromarray(levels).save(tmp_path / "m.png")
    write_video(tmp_path / "m.mp4", np.repeat(levels[None, ..., None], 3, axis=3).repeat(17, axis=0), 8)
    forms = [right_half(), right_half()[0], tmp_path / "m.png", Image.fromarray(levels)]
    clips = [pipeline(PROMPT, video=noise(), mask=form, **QUICK) for form in forms]
    assert len({(c.frames.tobytes(), c.metadata["inputs_sha256"]["mask"]) for c in clips}) == 1
    moving = pipeline(PROMPT, video=noise(), mask=tmp_path / "m.mp4", **QUICK)
    assert np.array_equal(moving.frames, clips[0].frames)
    large = pipeline(PROMPT, video=noise(), mask=right_half(1, 96, 128), **QUICK)
    assert np.array_equal(large.frames, clips[0].frames)


def test_latents_with_any_masked_pixel_are_made_anew():
    mask = np.zeros((9, 16, 24), bool)
    mask[0, 7, 8] = mask[4, 15, 0] = mask[5, 0, 23] = True
    found = latent_mask(mask, 3, 2, 3)[0, 0].int().tolist()
    assert found == [[[0, 1, 0], [0, 0, 0]], [[0, 0, 0], [1, 0, 0]], [[0, 0, 1], [0, 0, 0]]]
    assert latent_mask(mask, 4, 2, 3)[0, 0].int().tolist() == [found[0], *found]  # filled up in front
    assert latent_mask(mask[:1], 3, 2, 3)[0, 0].int().tolist() == [found[0]] * 3


@pytest.mark.parametrize(("wrong", "message"), [
    ({"mask": right_half()}, "mask is given without video; give the video that it is a mask of"),
    ({"video": noise(), "mask": right_half(9)}, "mask has 9 frames; it must have 1, or the 17 of video"),
    ({"video": noise(), "mask": ~right_half() & right_half()}, "mask is black where the video is made"),
    ({"video": noise(), "mask": right_half().astype(float)}, "mask is float64 [1, 48, 64]; it must be an image (PNG,"),
    ({"video": noise(), "mask": right_half()[:, :0]}, "mask is bool [1, 0, 64]; it must not be empty"),
])  # fmt: skip
def test_what_does_not_fit_is_named(wrong, message, pipeline):
    with pytest.raises(SettingsError, match=re.escape(message)):
        pipeline(PROMPT, **QUICK, **wrong)


def test_the_command_takes_a_mask_and_its_replay_needs_it(small_checkpoint, run_command, tmp_path):
    write_video(tmp_path / "v.mp4", noise(9), 8)
    Image.fromarray(np.where(right_half()[0], 255, 0).astype(np.uint8)).save(tmp_path / "m.png")
    inputs = ("--video", tmp_path / "v.mp4", "--mask", tmp_path / "m.png")
    words = ("--model", small_checkpoint("2b"), "--num-inference-steps", 2, "--no-progress", *inputs)
    status, _, err = run_command("generate", PROMPT, "-o", tmp_path / "a.mp4", *words)
    assert status == 0, err
    assert read_video(tmp_path / "a.mp4")[0].shape == (9, 48, 64, 3)
    status, out, err = run_command("replay", tmp_path / "a.mp4", *inputs, "--no-progress")
    assert status == 0 and "bytes equal" in out, err
    assert "was made from mask; give it with --mask" in run_command("replay", tmp_path / "a.mp4", *inputs[:2])[2]


@pytest.mark.slow
@pytest.mark.skipif(not (TINY / "transformer").is_dir(), reason=f"{TINY} holds no checkpoint; `make tiny` trains it")
def test_the_embedded_checkpoint_paints_the_masked_figure_in_another_colour():
    old, new = (f"a large {colour} circle moves left on a black background" for colour in ("red", "cyan"))
    video = render(parse(old), np.random.default_rng(3))
    mask = (video != 0).any(axis=(0, 3))
    mask = np.pad(mask, 3)[None]
    grown = np.stack([mask[:, i : i + 64, j : j + 64] for i in range(7) for j in range(7)]).any(0)
    pipeline = Pipeline.from_pretrained("tiny", device="cpu", numerics="diffusers")
    clip = pipeline(new, video=video, mask=grown, strength=1.0, num_inference_steps=25, seed=1, progress=False)
    assert np.array_equal(clip.frames[:, ~grown[0]], video[:, ~grown[0]])
    red, green, blue = clip.frames[:, grown[0]].reshape(-1, 3).astype(int).T
    before = (video[:, grown[0]].reshape(-1, 3)[:, 0] > 128).mean()
    assert ((green > 128) & (blue > 128) & (red < 128)).mean() > before / 2
    assert ((red > 128) & (green < 128)).mean() < before / 10
