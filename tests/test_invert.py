"""From a video to noise and back: the error falls with the steps, and the noise is what the pipeline takes."""

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvx import Pipeline
from cogvx.data.shapes import parse, render
from cogvx.data.video import read_video, write_video
from cogvx.invert import invert, psnr, reconstruct
from cogvx.models.checkpoint import TINY
from cogvx.numerics import DIFFUSERS
from cogvx.settings import SettingsError
from cogvx.start import video_latents

PROMPT = "a large red circle moves left on a black background"


@pytest.fixture(scope="module")
def video():
    return render(parse(PROMPT), np.random.default_rng(3))


@pytest.fixture(scope="module")
def tiny():
    if not (TINY / "transformer").is_dir():
        pytest.skip(f"{TINY} holds no checkpoint; `make tiny` trains it")
    return Pipeline.from_pretrained("tiny", device="cpu", numerics="diffusers")


def errors(pipeline, video, counts, **settings):
    """How far the reconstructed latents are from the video's, for each number of steps."""
    found = []
    for count in counts:
        inversion = invert(pipeline, video, num_inference_steps=count, progress=False, **settings)
        clip = reconstruct_latents(pipeline, inversion)
        wanted = video_latents(inversion.inputs, clip.shape[2], pipeline.vae, pipeline.numerics, None)
        found.append(((clip - wanted).norm() / wanted.norm()).item())
    return found


def reconstruct_latents(pipeline, inversion):
    kept = []
    settings = replace(inversion.settings, strength=None)
    given = {"prompt_embeds": inversion.text}
    inputs = replace(inversion.inputs, video=None, latents=inversion.latents)
    pipeline.generate([settings], inputs, given, lambda p, i, t, tensors: kept.append(tensors["latents"]), False)
    return kept[-1]


@pytest.mark.slow
def test_the_reconstruction_error_falls_with_the_steps(tiny, video):
    for prompt, steps in (("", (5, 10)), (PROMPT, (5, 10, 25))):
        found = errors(tiny, video, steps, prompt=prompt)
        assert all(after < before for before, after in pairwise(found)), found
        assert found[-1] < found[0] / 2, found
    refined = errors(tiny, video, (10,), prompt=PROMPT, refinements=3)[0]
    assert refined < 0.8 * found[1]


@pytest.mark.slow
def test_the_reconstruction_is_nearly_what_the_vae_gives_back(tiny, video):
    inversion = invert(tiny, video, PROMPT, num_inference_steps=50, progress=False)
    # Less than the noise of training: the posterior's mode of so plain a video is smoother than any sample of it.
    assert 0.4 < inversion.latents.std() < 1.2
    with torch.inference_mode():
        z = video_latents(inversion.inputs, 5, tiny.vae, DIFFUSERS, None)
        through = psnr(replace(reconstruct(tiny, inversion, False), frames=tiny.decode(z)[0]), inversion)
    again = psnr(reconstruct(tiny, inversion, False), inversion)
    assert through - 6 < again < through + 3 and again > 24, (again, through)


@pytest.mark.parametrize("kind", ["2b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_the_pipeline_makes_the_same_of_the_noise(kind, small_checkpoint):
    pipeline = Pipeline.from_pretrained(small_checkpoint(kind), numerics="diffusers")
    video = np.random.default_rng(0).integers(0, 256, (17, 48, 64, 3), np.uint8)
    inversion = invert(pipeline, video, "a red circle", num_inference_steps=4, seed=6, progress=False)
    image = {"image": video[0]} if kind.endswith("i2v") else {}
    again = pipeline("a red circle", **image, latents=inversion.latents, num_inference_steps=4, guidance_scale=1.0,
                     num_frames=17, sampler="ddim", seed=6, progress=False)  # fmt: skip
    made = reconstruct(pipeline, inversion, progress=False)
    assert np.array_equal(again.frames, made.frames) and made.frames.shape == (17, 48, 64, 3)
    assert made.metadata["not_replayable_because_of"] == ["prompt_embeds"]


@pytest.mark.parametrize(("wrong", "message"), [
    ({"num_inference_steps": 30}, "num_inference_steps is 30; to invert, it must divide 1000, the nearest is 25"),
    ({"refinements": -1}, "refinements is -1; it must be a whole number from 0"),
    ({"guidance_scale": "x"}, "guidance_scale is 'x'"),
    ({"num_frames": 17}, "num_frames is 17, but video has 9 frames"),
])  # fmt: skip
def test_what_does_not_fit_is_named(wrong, message, small_checkpoint):
    pipeline = Pipeline.from_pretrained(small_checkpoint("2b"), numerics="diffusers")
    with pytest.raises(SettingsError, match=re.escape(message)):
        invert(pipeline, np.zeros((9, 48, 64, 3), np.uint8), progress=False, **wrong)


def test_any_number_of_steps_where_each_ends_at_the_next(small_checkpoint):
    pipeline = Pipeline.from_pretrained(small_checkpoint("2b"), numerics="diffusers,moves=visited")
    video = np.zeros((9, 48, 64, 3), np.uint8)
    assert invert(pipeline, video, num_inference_steps=3, progress=False).latents.shape == (1, 4, 3, 6, 8)


def test_the_command_writes_noise_and_the_video_again(small_checkpoint, run_command, tmp_path):
    write_video(tmp_path / "v.mp4", np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), np.uint8), 8)
    words = ("invert", tmp_path / "v.mp4", "-o", tmp_path / "n.safetensors", "--model", small_checkpoint("2b"))
    more = ("--num-inference-steps", 4, "--no-progress", "--reconstruct", tmp_path / "r.mp4")
    status, out, err = run_command(*words, *more)
    assert status == 0, err
    first, second = out.splitlines()
    assert first == f"{tmp_path / 'n.safetensors'}  latents [1, 4, 3, 6, 8]"
    assert re.fullmatch(re.escape(f"{tmp_path / 'r.mp4'}  PSNR ") + r"[\d.]+ dB", second)
    assert load_file(tmp_path / "n.safetensors")["latents"].shape == (1, 4, 3, 6, 8)
    assert read_video(tmp_path / "r.mp4")[0].shape == (9, 48, 64, 3)
    status, _, err = run_command(*words, "--reconstruct", tmp_path / "v.mp4")
    assert status == 2 and "it is the file that is read" in err


@pytest.mark.parametrize("kind", ["2b", "1.5-5b"])
def test_the_commands_round_trip_from_video_to_noise_to_video_to_its_replay(kind, small_checkpoint, run_command,
                                                                            tmp_path, monkeypatch):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    video = np.random.default_rng(0).integers(0, 256, (17, 32, 64, 3), np.uint8)
    write_video("v.mp4", video, 16 if kind == "1.5-5b" else 8)  # the model's, on which H.264's bits depend
    model = ("--model", small_checkpoint(kind), "--num-inference-steps", 4, "--no-progress")
    words = ("--prompt", "a red circle", "--height", 32, "--width", 64, "--reconstruct", "r.mp4")
    assert run_command("invert", "v.mp4", "-o", "n.safetensors", *model, *words)[0] == 0
    # Of the noise's size, which is not the checkpoint's.
    words = ("--latents", "n.safetensors", "--sampler", "ddim", "--guidance-scale", 1, "--seed", 0)
    status, _, err = run_command("generate", "a red circle", "-o", "g.mp4", *model, *words)
    assert status == 0, err
    made, reconstructed = read_video("g.mp4")[0], read_video("r.mp4")[0]
    assert made.shape == (17, 32, 64, 3) and np.array_equal(made, reconstructed)
    assert run_command("replay", "g.mp4", "--latents", "n.safetensors", "--no-progress")[1] == (
        "g-replay.mp4: frames equal, bytes equal\n"
    )
    assert "g.mp4 was made from latents; give it with --latents" in run_command("replay", "g.mp4")[2]
    other = load_file("n.safetensors")["latents"]
    other[0, 0, 0, 0, 0] += 1
    save_file({"latents": other}, "o.safetensors")
    message = "latents is o.safetensors, whose values are not those that g.mp4 was made from"
    assert message in run_command("replay", "g.mp4", "--latents", "o.safetensors")[2]


@pytest.mark.parametrize(("tensors", "message"), [
    ({"z": torch.zeros(1, 4, 3, 6, 8)}, "latents is n.safetensors, which holds tensors named 'z'; it must hold one"),
    ({}, "latents is n.safetensors, which holds tensors named nothing"),
    ({"latents": torch.zeros(1, 4, 3, 6, 8).int()}, "latents is torch.int32 [1, 4, 3, 6, 8]; it must be a safetensors"),
    ({"latents": torch.full((1, 4, 3, 6, 8), torch.inf)}, "latents holds values that are not finite"),
    ({"latents": torch.zeros(1, 5, 3, 6, 8)}, "latents has shape [1, 5, 3, 6, 8]; here it must be [1, 4, 3, 6, 8]"),
    ({"latents": torch.zeros(1, 4, 2, 6, 8)}, "num_frames is 5; this model makes 8N+1 frames from 1 to 17"),
    (None, "n.safetensors is no intact safetensors file"),
])  # fmt: skip
def test_noise_that_does_not_fit_is_named_before_any_weight_is_read(tensors, message, small_checkpoint, run_command,
                                                                    tmp_path, monkeypatch):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cogvx.pipeline.Pipeline.from_pretrained", None)
    (tmp_path / "n.safetensors").write_bytes(b"no tensors")
    if tensors is not None:
        save_file(tensors, "n.safetensors")
    words = ("--model", small_checkpoint("2b"), "--latents", "n.safetensors")
    status, out, err = run_command("generate", "a red circle", "-o", "g.mp4", *words)
    assert (status, out) == (2, "") and message in err and not (tmp_path / "g.mp4").exists()
