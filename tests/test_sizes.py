"""Any size that the patches divide, for every kind of model, and several videos of a prompt."""

import re

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image

from cogvx import Pipeline
from cogvx.numerics import NumericsError

PROMPT = "a red circle moves left"
KINDS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")
# Height and width; the trained ones are 48 and 64.
SIZES = {"diffusers": [(64, 48), (16, 16)], "sat,sincos_table=recomputed": [(48, 80), (112, 16)]}
QUICK = {"num_inference_steps": 1, "guidance_scale": 1.0, "progress": False}


@pytest.fixture(scope="module")
def load(small_checkpoint):
    return lambda kind, numerics="diffusers": Pipeline.from_pretrained(small_checkpoint(kind), numerics=numerics)


def given(kind, height=48, width=64):
    picture = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    picture = np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    return {"image": picture} if kind.endswith("i2v") else {}


def frames_of(kind):
    """The least that is more than one."""
    return 17 if kind.startswith("1.5") else 9


@pytest.mark.parametrize("numerics", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_video_has_exactly_the_size_that_was_asked_for(kind, numerics, load):
    pipeline, num_frames = load(kind, numerics), frames_of(kind)
    for height, width in SIZES[numerics]:
        size = {"num_frames": num_frames, "height": height, "width": width}
        clip = pipeline(PROMPT, **size, seed=3, **given(kind), **QUICK)
        assert clip.frames.shape == (num_frames, height, width, 3) and clip.frames.std() > 10


@pytest.mark.parametrize("kind", ["5b", "1.5-5b", "1.5-5b-i2v"])
def test_a_portrait_is_that_of_diffusers_where_that_can_make_it(kind, load, small_checkpoint):
    family = CogVideoXImageToVideoPipeline if kind.endswith("i2v") else CogVideoXPipeline
    theirs = family.from_pretrained(small_checkpoint(kind))
    theirs.scheduler = CogVideoXDDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    if kind.startswith("1.5"):  # its positions are rows of a table of the config's size, too few for a portrait
        theirs.transformer.register_to_config(sample_height=40, sample_width=40)
    size = {"height": 80, "width": 48, "num_frames": frames_of(kind), "num_inference_steps": 2}
    images = {name: Image.fromarray(picture) for name, picture in given(kind, 80, 48).items()}
    frames = theirs(prompt=PROMPT, **images, **size, max_sequence_length=16, output_type="np",
                    generator=torch.Generator().manual_seed(5)).frames[0]  # fmt: skip
    ours = load(kind)(PROMPT, sampler="ddim", seed=5, progress=False, **size, **given(kind, 80, 48)).frames
    assert frames.shape == ours.shape and ours.std() > 10
    assert (np.abs(ours.astype(int) - (frames * 255).round()) <= 1).mean() >= 0.999


def test_a_size_that_a_models_table_does_not_hold_is_named(load):
    size = {"height": 80, "width": 64, "num_frames": 17} | QUICK
    for kind in ("2b", "5b-i2v"):
        message = "sincos_table of numerics is 'sliced'; the video has 100 patches, and the table that it slices has 60"
        with pytest.raises(NumericsError, match=re.escape(message)):
            load(kind, "diffusers,sincos_table=sliced")(PROMPT, **size, **given(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_two_videos_of_a_prompt_are_those_of_two_calls(kind, load):
    size = {"num_frames": frames_of(kind), "height": 64, "width": 32}
    pipeline, settings = load(kind), {**size, **QUICK, **given(kind), "guidance_scale": 6.0}
    alone = [pipeline(PROMPT, seed=seed, **settings).frames for seed in (4, 5)]
    assert not np.array_equal(*alone)
    for clip, frames in zip(pipeline.batch([PROMPT], 2, seed=4, **settings), alone, strict=True):
        assert np.array_equal(clip.frames, frames)
    for clip, frames in zip(pipeline.batch([PROMPT], 2, seed=4, batch_size=2, **settings), alone, strict=True):
        assert np.abs(clip.frames.astype(int) - frames).max() <= 1
