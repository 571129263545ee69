"""Image to video beside diffusers', the inputs that it takes, and what they leave in the file."""

import re

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image

from cogvx import Pipeline
from cogvx.numerics import read_numerics
from cogvx.settings import SettingsError

PROMPT = "a red circle moves left"
SCHEDULERS = {"ddim": CogVideoXDDIMScheduler, "dpmpp_2m_sde": CogVideoXDPMScheduler}
QUICK = {"num_inference_steps": 3, "seed": 3, "progress": False}


def picture(height=48, width=64, seed=0):
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def pipeline(small_checkpoint):
    return Pipeline.from_pretrained(small_checkpoint("5b-i2v"), numerics="diffusers")


@pytest.fixture(scope="module")
def oracle(small_checkpoint):
    """`oracle(kind, sampler, **settings)`: frames of diffusers' pipeline on the same folder."""

    def run(kind, sampler, **settings):
        family = CogVideoXImageToVideoPipeline if kind.endswith("i2v") else CogVideoXPipeline
        theirs = family.from_pretrained(small_checkpoint(kind))
        theirs.scheduler = SCHEDULERS[sampler].from_config(theirs.scheduler.config)
        theirs.set_progress_bar_config(disable=True)
        video = theirs(**settings, height=48, width=64, max_sequence_length=16, output_type="np").frames[0]
        return (video * 255).round().astype(np.uint8)

    return run


def share_within_a_level(ours, theirs):
    assert ours.shape == theirs.shape
    return (np.abs(ours.astype(int) - theirs.astype(int)) <= 1).mean()


# 17 frames are 5 latents, which 1.5 fills up to 6.
@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize(("kind", "num_frames"), [("5b-i2v", 17), ("1.5-5b-i2v", 17), ("1.5-5b", 17)])
def test_the_same_image_prompt_and_seed_make_the_same_video_in_diffusers(
    kind, num_frames, sampler, small_checkpoint, oracle
):
    settings = {"num_inference_steps": 4, "num_frames": num_frames, "guidance_scale": 4.0}
    images = kind.endswith("i2v")
    pipeline = Pipeline.from_pretrained(small_checkpoint(kind), numerics="diffusers")
    ours = pipeline(PROMPT, sampler=sampler, seed=5, progress=False, **settings,
                    **({"image": picture()} if images else {}))  # fmt: skip
    theirs = oracle(kind, sampler, prompt=PROMPT, generator=torch.Generator().manual_seed(5), **settings,
                    **({"image": Image.fromarray(picture())} if images else {}))  # fmt: skip
    assert ours.frames.std() > 20 and ours.fps == (8 if kind == "5b-i2v" else 16)
    assert share_within_a_level(ours.frames, theirs) >= 0.999


def test_without_guidance_and_from_given_noise(pipeline, oracle):
    noise = torch.randn(1, 4, 5, 6, 8, generator=torch.Generator().manual_seed(8))
    settings = {"num_inference_steps": 3, "num_frames": 17, "guidance_scale": 1.0}
    ours = pipeline(PROMPT, image=picture(), latents=noise, sampler="ddim", seed=5, progress=False, **settings)
    theirs = oracle("5b-i2v", "ddim", prompt=PROMPT, image=Image.fromarray(picture()), latents=noise.transpose(1, 2),
                    generator=torch.Generator().manual_seed(5), **settings)  # fmt: skip
    assert share_within_a_level(ours.frames, theirs) >= 0.999


def test_image_last_image_and_ofs_change_the_video(small_checkpoint):
    pipeline = Pipeline.from_pretrained(small_checkpoint("1.5-5b-i2v"), numerics="diffusers")
    calls = [
        {"image": picture()}, {"image": picture(seed=1)}, {"image": picture(), "last_image": picture(seed=1)},
        {"image": picture(), "ofs": 1.0},
    ]  # fmt: skip
    clips = [pipeline(PROMPT, **QUICK, **call) for call in calls]
    assert len({clip.frames.tobytes() for clip in clips}) == len(calls)
    assert [clip.metadata["ofs"] for clip in clips] == [2.0, 2.0, 2.0, 1.0]
    assert np.array_equal(clips[0].frames, pipeline(PROMPT, image=picture(), ofs=2.0, **QUICK).frames)


def test_the_numerics_scale_the_images_latent_in_1_5_alone(small_checkpoint):
    def frames(kind, choice):
        numerics = read_numerics(f"diffusers,image_latent_1_5={choice}")
        pipeline = Pipeline.from_pretrained(small_checkpoint(kind), numerics=numerics)
        assert pipeline.numerics.image_latent_1_5 == choice
        return pipeline(PROMPT, image=picture(), **QUICK).frames.tobytes()

    choices = ("unscaled", "divided", "multiplied")
    assert len({frames("1.5-5b-i2v", choice) for choice in choices}) == 3
    assert len({frames("5b-i2v", choice) for choice in choices}) == 1


def test_files_arrays_and_pillow_images_are_the_same_and_their_pixels_are_hashed(pipeline, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    forms = [picture(), Image.fromarray(picture()), tmp_path / "a.png", str(tmp_path / "a.png")]
    clips = [pipeline(PROMPT, image=form, **QUICK) for form in forms]
    assert len({clip.frames.tobytes() for clip in clips}) == 1
    hashes = [clip.metadata["inputs_sha256"] for clip in clips]
    assert hashes == [hashes[0]] * 4 and list(hashes[0]) == ["image"] and len(hashes[0]["image"]) == 64
    other = pipeline(PROMPT, image=picture(seed=1), last_image=picture(), **QUICK).metadata["inputs_sha256"]
    assert list(other) == ["image", "last_image"] and other["last_image"] == hashes[0]["image"] != other["image"]


def test_an_image_of_another_size_covers_the_video(pipeline):
    large = picture(96, 148)
    cut = np.asarray(Image.fromarray(large).resize((74, 48), Image.Resampling.LANCZOS))[:, 5:69]
    assert np.array_equal(*(pipeline(PROMPT, image=image, **QUICK).frames for image in (large, cut)))


def test_several_prompts_with_one_image_are_those_of_single_calls(pipeline):
    settings = {"num_inference_steps": 2, "image": picture(), "progress": False}
    clips = pipeline.batch([PROMPT, "a red circle"], seed=4, **settings)
    alone = [pipeline(prompt, seed=4 + i, **settings) for i, prompt in enumerate([PROMPT, "a red circle"])]
    assert all(np.array_equal(one.frames, other.frames) for one, other in zip(clips, alone, strict=True))
    together = pipeline.batch([PROMPT, "a red circle"], seed=4, batch_size=2, **settings)
    assert all(share_within_a_level(one.frames, other.frames) == 1 for one, other in zip(together, alone, strict=True))


def test_what_is_saved_is_an_image_pipeline_for_diffusers(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "again")
    CogVideoXImageToVideoPipeline.from_pretrained(tmp_path / "again")
    again = Pipeline.from_pretrained(tmp_path / "again", numerics="diffusers")
    assert np.array_equal(*(p(PROMPT, image=picture(), **QUICK).frames for p in (again, pipeline)))


@pytest.mark.parametrize(("kind", "wrong", "message"), [
    ("5b-i2v", {}, "image is None; this is an image-to-video model: give the first frame as image"),
    ("5b-i2v", {"last_image": picture()}, "image is None; this is an image-to-video model"),
    ("5b", {"image": picture()}, "image is given, but this model has 4 input channels, none of them for images"),
    ("5b", {"last_image": picture()}, "last_image is given, but this model has 4 input channels"),
    ("5b-i2v", {"image": picture()[None]}, "image is uint8 [1, 48, 64, 3]; it must be a file, a Pillow image or uint8"),
    ("5b-i2v", {"image": picture().astype(float)}, "image is float64 [48, 64, 3]; it must be a file"),
    ("5b-i2v", {"image": picture()[:0]}, "image is uint8 [0, 64, 3]; it must not be empty"),
    ("5b-i2v", {"image": 7}, "image is of type int; it must be a file, a Pillow image or uint8 [H, W, 3]"),
    ("5b-i2v", {"image": picture(), "ofs": 2.0}, "ofs is 2.0; this model takes none, leave it out"),
    ("1.5-5b-i2v", {"image": picture(), "ofs": float("nan")}, "ofs is nan; it must be a finite number, 2.0 as in"),
    ("1.5-5b-i2v", {"image": picture(), "num_frames": 9}, "num_frames is 9; this model makes 16N+1 frames from 1 to"),
    ("5b-i2v", {"image": picture(), "num_frames": 1, "last_image": picture()}, "last_image is given for a video of 1"),
])  # fmt: skip
def test_what_does_not_fit_is_named(kind, wrong, message, small_checkpoint):
    pipeline = Pipeline.from_pretrained(small_checkpoint(kind), numerics="diffusers")
    with pytest.raises(SettingsError, match=re.escape(message)):
        pipeline(PROMPT, **QUICK, **wrong)
