"""The whole way from a prompt to frames, beside diffusers' and against the promises of the public face."""

import inspect
import re

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline

from cogvx import Clip, Pipeline
from cogvx.data.video import read_metadata, read_video
from cogvx.settings import SettingsError

PROMPT = "a red circle moves left"
SCHEDULERS = {"ddim": CogVideoXDDIMScheduler, "dpmpp_2m_sde": CogVideoXDPMScheduler}
QUICK = {"num_inference_steps": 2, "num_frames": 9, "seed": 3, "progress": False}


@pytest.fixture(scope="module")
def pipeline(small_checkpoint):
    return Pipeline.from_pretrained(small_checkpoint("5b"), numerics="diffusers")


@pytest.fixture(scope="module")
def oracle(small_checkpoint):
    """diffusers' pipeline on the same folder, as a function to frames."""

    def load(kind, sampler):
        theirs = CogVideoXPipeline.from_pretrained(small_checkpoint(kind))
        theirs.scheduler = SCHEDULERS[sampler].from_config(theirs.scheduler.config)
        theirs.set_progress_bar_config(disable=True)

        def run(**settings):
            video = theirs(**settings, max_sequence_length=16, output_type="np").frames[0]
            return (video * 255).round().astype(np.uint8)

        return run

    return load


def share_within_a_level(ours, theirs):
    assert ours.shape == theirs.shape
    return (np.abs(ours.astype(int) - theirs.astype(int)) <= 1).mean()


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_makes_what_diffusers_makes_from_the_same_noise_and_embeddings(kind, sampler, small_checkpoint, oracle):
    ours = Pipeline.from_pretrained(small_checkpoint(kind), numerics="diffusers")
    generator = torch.Generator().manual_seed(11)
    num_frames, height, width = (17, 48, 64) if sampler == "ddim" else (9, 64, 48)
    size = {"num_frames": num_frames, "height": height, "width": width, "num_inference_steps": 5}
    noise = torch.randn(1, 4, (num_frames - 1) // 4 + 1, height // 8, width // 8, generator=generator)
    embeds = {name: torch.randn(1, 16, 24, generator=generator) for name in ("prompt_embeds", "negative_prompt_embeds")}
    # What DPM-Solver++ draws on the way comes from the seed, in the same order here and there.
    mine = ours(latents=noise, **embeds, **size, sampler=sampler, seed=4, progress=False)
    theirs = oracle(kind, sampler)(
        latents=noise.transpose(1, 2), **embeds, **size, generator=torch.Generator().manual_seed(4)
    )
    assert mine.frames.std() > 20 and np.abs(np.diff(mine.frames.astype(int), axis=0)).mean() > 1  # a real picture
    assert share_within_a_level(mine.frames, theirs) >= 0.999


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_the_same_prompt_and_seed_make_the_same_video_in_diffusers(sampler, pipeline, oracle):
    settings = {"num_inference_steps": 3, "num_frames": 9, "height": 48, "width": 64, "guidance_scale": 4.0}
    mine = pipeline(PROMPT, negative_prompt="blue", sampler=sampler, seed=5, progress=False, **settings)
    generator = torch.Generator().manual_seed(5)
    theirs = oracle("5b", sampler)(prompt=PROMPT, negative_prompt="blue", generator=generator, **settings)
    assert share_within_a_level(mine.frames, theirs) >= 0.999


@pytest.mark.parametrize(("ours", "theirs"), [({"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
                                              ({"dynamic_guidance": "wave"}, {"use_dynamic_cfg": True})])  # fmt: skip
def test_guidance_is_as_in_diffusers(ours, theirs, pipeline, oracle):
    settings = {"num_inference_steps": 3, "num_frames": 9}
    mine = pipeline(PROMPT, seed=5, progress=False, sampler="ddim", **settings, **ours)
    other = oracle("5b", "ddim")(
        prompt=PROMPT, generator=torch.Generator().manual_seed(5), height=48, width=64, **settings, **theirs
    )
    assert share_within_a_level(mine.frames, other) >= 0.999


def test_the_public_face():
    def face(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items() if name != "self"}

    assert face(Pipeline.from_pretrained) == {
        "model": "tiny", "dtype": None, "device": None, "numerics": "sat", "transformer": None, "vae": None,
        "memory": None, "planned_for": None, "weights": None, "loras": (), "speed": None,
    }  # fmt: skip
    assert face(Pipeline.__call__) == {
        "prompt": None, "image": None, "last_image": None, "video": None, "mask": None, "strength": 0.8,
        "negative_prompt": "", "num_frames": None, "height": None, "width": None,
        "num_inference_steps": 50, "guidance_scale": 6.0, "dynamic_guidance": None, "sampler": None, "seed": None,
        "ofs": None, "longer": None, "latents": None, "prompt_embeds": None, "negative_prompt_embeds": None,
        "callback_on_step_end": None, "progress": True,
    }  # fmt: skip
    assert list(face(Pipeline.batch))[:3] == ["prompts", "num_videos_per_prompt", "seed"]


def test_a_clip_has_frames_and_saves_what_made_it(pipeline, tmp_path):
    clip = pipeline(PROMPT, **QUICK)
    assert isinstance(clip, Clip) and clip.fps == 8
    assert clip.frames.dtype == np.uint8 and clip.frames.shape == (9, 48, 64, 3)
    assert clip.save(tmp_path / "red.mp4") == tmp_path / "red.mp4"
    frames, fps = read_video(tmp_path / "red.mp4")
    assert frames.shape == clip.frames.shape and fps == 8
    carried = read_metadata(tmp_path / "red.mp4")
    assert carried == clip.metadata and len(carried["model_sha256"]) == 64
    wanted = {"prompt": PROMPT, "seed": 3, "num_frames": 9, "height": 48, "width": 64, "sampler": "dpmpp_2m_sde"}
    assert {name: carried[name] for name in wanted} == wanted and not carried["not_replayable_because_of"]


def test_an_unset_seed_is_drawn_and_kept(pipeline):
    clip = pipeline(PROMPT, **{**QUICK, "seed": None})
    again = pipeline(PROMPT, **{**QUICK, "seed": clip.metadata["seed"]})
    assert np.array_equal(clip.frames, again.frames)
    assert pipeline(PROMPT, **{**QUICK, "seed": None}).metadata["seed"] != clip.metadata["seed"]


def test_a_callback_sees_every_step_and_may_replace_the_latents(pipeline):
    seen = []

    def watch(pipe, index, timestep, tensors):
        seen.append((pipe is pipeline, index, timestep, tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros(1, 4, 3, 6, 8)} if index == 1 else None

    clip = pipeline(PROMPT, **QUICK, callback_on_step_end=watch)
    assert seen == [(True, 0, 999, (1, 4, 3, 6, 8)), (True, 1, 499, (1, 4, 3, 6, 8))]
    with torch.inference_mode():
        assert np.array_equal(clip.frames, pipeline.decode(torch.zeros(1, 4, 3, 6, 8))[0])


def test_a_callback_that_returns_what_it_got_changes_nothing(pipeline):
    clip = pipeline(PROMPT, **QUICK, callback_on_step_end=lambda pipe, index, timestep, tensors: tensors)
    assert np.array_equal(clip.frames, pipeline(PROMPT, **QUICK).frames)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"latents": torch.zeros(1, 4, 5, 6, 8)}, "latents has shape [1, 4, 5, 6, 8]; here it must be [1, 4, 3, 6, 8]"),
    ({"latents": torch.zeros(1, 5, 3, 6, 8)}, "latents has shape [1, 5, 3, 6, 8]; here it must be [1, 4, 3, 6, 8]"),
    ({"latents": torch.zeros(1, 4, 3, 6, 7)}, "width is 56; it must be a multiple of 16"),
    ({"latents": torch.zeros(4, 3, 6, 8)}, "latents is torch.float32 [4, 3, 6, 8]; it must be a safetensors file or a"),
    ({"latents": torch.zeros(1, 4, 3, 6, 8).int()}, "latents is torch.int32 [1, 4, 3, 6, 8]; it must be a safetensors"),
    ({"latents": [1.0]}, "latents is of type list; it must be a safetensors file or a tensor of numbers"),
    ({"latents": torch.full((1, 4, 3, 6, 8), torch.nan)}, "latents holds values that are not finite"),
    ({"prompt_embeds": torch.full((1, 16, 24), torch.inf)}, "prompt_embeds holds values that are not finite"),
    ({"prompt_embeds": torch.zeros(1, 15, 24)}, "prompt_embeds has shape [1, 15, 24]; here it must be [1, 16, 24]"),
    ({"negative_prompt_embeds": [1.0]}, "negative_prompt_embeds is of type list; it must be a tensor"),
    ({"prompt": None}, "prompt is None and so is prompt_embeds"),
    ({"prompt": " "}, "prompt is ' '; say in words"),
    ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(2)}}, "latents of callback_on_step_end has shape [2]"),
])  # fmt: skip
def test_what_does_not_fit_is_named(wrong, message, pipeline):
    with pytest.raises(SettingsError, match=re.escape(message)):
        pipeline(**{"prompt": PROMPT, **QUICK, **wrong})


@pytest.mark.parametrize(("call", "message"), [
    (dict(prompts=PROMPT), "prompts is 'a red circle moves left'; it must be a list of at least one prompt"),
    (dict(prompts=[]), r"prompts is \[\]"),
    (dict(prompts=[PROMPT, ""]), "prompt is ''"),
    (dict(prompts=[PROMPT], num_videos_per_prompt=0), "num_videos_per_prompt is 0"),
    (dict(prompts=[PROMPT], batch_size=1.5), "batch_size is 1.5"),
    (dict(prompts=[PROMPT] * 2, seed=2**63 - 1), f"seed is {2**63}; it must be from 0 to {2**63 - 1}"),
])  # fmt: skip
def test_a_wrong_batch_is_refused_before_its_first_clip(call, message, pipeline):
    with pytest.raises(SettingsError, match=message):
        pipeline.batch(**call)


def test_what_is_saved_makes_the_same_video(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "again")
    again = Pipeline.from_pretrained(tmp_path / "again", numerics="diffusers")
    assert np.array_equal(again(PROMPT, **QUICK).frames, pipeline(PROMPT, **QUICK).frames)
    theirs = CogVideoXPipeline.from_pretrained(tmp_path / "again")
    ours = pipeline.transformer.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.transformer.state_dict().items())


def test_half_precision_is_computed_in_single_on_a_cpu_and_other_types_as_asked(pipeline, tmp_path):
    half = Pipeline.from_pretrained(pipeline.folder, torch.float16, "cpu", "diffusers")
    half.save_pretrained(tmp_path / "half")
    stored = Pipeline.from_pretrained(tmp_path / "half", device="cpu", numerics="diffusers")
    assert half.dtype == torch.float16 and stored.dtype == torch.float32
    low = Pipeline.from_pretrained(pipeline.folder, torch.bfloat16, "cpu", "diffusers")
    clip = low(PROMPT, **QUICK)
    assert clip.metadata["dtype"] == "bfloat16" and clip.frames.std() > 20
