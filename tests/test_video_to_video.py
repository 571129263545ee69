"""Video to video beside diffusers', the videos that it takes, and what they leave in the file."""

import re

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXVideoToVideoPipeline
from PIL import Image

from cogvx import Clip, Pipeline
from cogvx.data.video import read_video, write_video
from cogvx.settings import SettingsError

PROMPT = "a red circle moves left"
SCHEDULERS = {"ddim": CogVideoXDDIMScheduler, "dpmpp_2m_sde": CogVideoXDPMScheduler}
QUICK = {"num_inference_steps": 4, "seed": 3, "progress": False}


def moving(num_frames=17, height=48, width=64, seed=0):
    """A smooth random picture that moves one pixel a frame."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    picture = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return np.stack([np.roll(picture, t, axis=1) for t in range(num_frames)])


@pytest.fixture(scope="module")
def pipeline(small_checkpoint):
    return Pipeline.from_pretrained(small_checkpoint("5b"), numerics="diffusers")


@pytest.fixture(scope="module")
def oracle(small_checkpoint):
    """`oracle(kind, sampler, **settings)`: frames of diffusers' pipeline on the same folder."""

    def run(kind, sampler, video, seed, **settings):
        theirs = CogVideoXVideoToVideoPipeline.from_pretrained(small_checkpoint(kind), numerics="diffusers")
        theirs.scheduler = SCHEDULERS[sampler].from_config(theirs.scheduler.config)
        theirs.set_progress_bar_config(disable=True)
        made = theirs(
            [Image.fromarray(frame) for frame in video], PROMPT, generator=torch.Generator().manual_seed(seed),
            height=48, width=64, max_sequence_length=16, output_type="np", **settings,
        ).frames[0]  # fmt: skip
        return (made * 255).round().astype(np.uint8)

    return run


def share_within_a_level(ours, theirs):
    assert ours.shape == theirs.shape
    return (np.abs(ours.astype(int) - theirs.astype(int)) <= 1).mean()


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize(("kind", "strength"), [("2b", 0.8), ("5b", 0.5), ("5b", 1.0)])
def test_the_same_video_prompt_and_seed_make_the_same_in_diffusers(kind, strength, sampler, small_checkpoint, oracle):
    settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "strength": strength}
    pipeline = Pipeline.from_pretrained(small_checkpoint(kind), numerics="diffusers")
    ours = pipeline(PROMPT, video=moving(), sampler=sampler, seed=5, progress=False, **settings).frames
    theirs = oracle(kind, sampler, moving(), 5, **settings)
    assert ours.std() > 20
    assert share_within_a_level(ours, theirs) >= 0.999


def test_the_released_dynamic_guidance_counts_the_steps_that_run(pipeline, oracle):
    settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "strength": 0.6}
    ours = pipeline(PROMPT, video=moving(), seed=5, progress=False, sampler="ddim", dynamic_guidance="wave", **settings)
    theirs = oracle("5b", "ddim", moving(), 5, use_dynamic_cfg=True, **settings)
    assert share_within_a_level(ours.frames, theirs) >= 0.999


def test_a_patch_in_time_is_filled_up_and_an_image_model_sees_the_first_frame(small_checkpoint):
    for kind in ("1.5-5b", "1.5-5b-i2v", "5b-i2v"):
        pipeline = Pipeline.from_pretrained(small_checkpoint(kind), numerics="diffusers")
        clip = pipeline(PROMPT, video=moving(), **QUICK)
        assert clip.frames.shape == (17, 48, 64, 3) and list(clip.metadata["inputs_sha256"]) == ["video"]
        if kind != "1.5-5b":
            same, other = (pipeline(PROMPT, video=moving(), image=moving(1, seed=s)[0], **QUICK) for s in (0, 1))
            assert np.array_equal(clip.frames, same.frames) and not np.array_equal(clip.frames, other.frames)


def test_the_steps_that_run_are_the_last_ones(pipeline):
    seen = []
    settings = {"num_inference_steps": 10, "guidance_scale": [9.0] * 7 + [1.0] * 3, "progress": False, "seed": 1}
    clip = pipeline(PROMPT, video=moving(9), strength=0.35, **settings,
                    callback_on_step_end=lambda pipe, i, t, tensors: seen.append((i, t)))  # fmt: skip
    assert seen == [(0, 299), (1, 199), (2, 99)]
    # The list is of all steps; those that run are guided by its last ones, here not at all.
    unguided = pipeline(PROMPT, video=moving(9), strength=0.35, **(settings | {"guidance_scale": 1.0}))
    assert share_within_a_level(clip.frames, unguided.frames) == 1


def test_less_strength_stays_nearer_to_the_video_through_the_vae(pipeline):
    with torch.inference_mode():
        x = torch.from_numpy(moving()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        z = pipeline.vae.encode(x).mode() * pipeline.configs.vae.scaling_factor
        through = pipeline.decode(z)[0].astype(int)
    settings = {"num_inference_steps": 50, "seed": 2, "progress": False, "guidance_scale": 1.0}
    away = [np.abs(pipeline(PROMPT, video=moving(), strength=s, **settings).frames - through).mean()
            for s in (0.02, 0.2, 1.0)]  # fmt: skip
    assert away[0] < away[1] < away[2]


def test_files_clips_and_arrays_are_taken_and_as_many_frames_as_fit(pipeline, tmp_path):
    write_video(tmp_path / "a.mp4", moving(16), 12)
    frames = read_video(tmp_path / "a.mp4")[0]
    forms = [tmp_path / "a.mp4", Clip(frames, 12), frames]
    clips = [pipeline(PROMPT, video=form, **QUICK) for form in forms]
    assert len({clip.frames.tobytes() for clip in clips}) == 1 and clips[0].frames.shape[0] == 9
    assert [clip.fps for clip in clips] == [12, 12, 8] == [clip.metadata["fps"] for clip in clips]
    assert len({clip.metadata["inputs_sha256"]["video"] for clip in clips}) == 1
    first = pipeline(PROMPT, video=frames[:9], **QUICK)
    assert np.array_equal(first.frames, clips[2].frames)
    assert first.metadata["inputs_sha256"] != clips[2].metadata["inputs_sha256"]


def test_the_numerics_say_how_the_video_is_encoded(small_checkpoint):
    made = [Pipeline.from_pretrained(small_checkpoint("5b"), numerics=f"diffusers,vae_encode_chunks={chunks}")(
        PROMPT, video=moving(), **QUICK).frames for chunks in ("whole", "8_frames")]  # fmt: skip
    assert not np.array_equal(*made)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"video": moving(), "strength": 0}, "strength is 0; it must be a number above 0, up to 1"),
    ({"video": moving(), "strength": 1.1}, "strength is 1.1; it must be a number above 0, up to 1"),
    ({"video": moving(), "strength": None}, "strength is None; with a video it must be a number above 0, up to 1"),
    ({"video": moving(), "strength": True}, "strength is True"),
    ({"video": moving(), "strength": 0.2}, "strength is 0.2; of 4 steps that leaves none, the least is 0.25"),
    ({"video": moving(9), "num_frames": 17}, "num_frames is 17, but video has 9 frames; ask for fewer"),
    ({"video": moving()[0]}, "video is uint8 [48, 64, 3]; it must be a file, a Clip or uint8 [T, H, W, 3]"),
    ({"video": [1]}, "video is of type list; it must be a file, a Clip or uint8 [T, H, W, 3]"),
    ({"video": moving()[:0]}, "video is uint8 [0, 48, 64, 3]; it must not be empty"),
])  # fmt: skip
def test_what_does_not_fit_is_named(wrong, message, pipeline):
    with pytest.raises(SettingsError, match=re.escape(message)):
        pipeline(PROMPT, **QUICK, **wrong)
