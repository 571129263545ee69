"""Clips longer than trained: windows that overlap in time, and positions that do not repeat."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvx import Pipeline
from cogvx.config import PRESETS
from cogvx.data.video import read_video
from cogvx.denoise import window_length
from cogvx.diffusion.windows import window_starts, windowed
from cogvx.inputs import Inputs, planned
from cogvx.models.checkpoint import TINY
from cogvx.models.choices import placement
from cogvx.numerics import DIFFUSERS
from cogvx.settings import Settings, SettingsError

PROMPT = "a red circle moves left"
CLIPS = Path(__file__).parents[2] / "shared" / "clips"
QUICK = {"num_inference_steps": 2, "seed": 3, "progress": False}


@pytest.fixture(scope="module")
def load(small_checkpoint):
    return lambda kind: Pipeline.from_pretrained(small_checkpoint(kind))


@pytest.fixture
def seen(monkeypatch):
    """How many latent frames the transformer sees in each call, and whether it sees an image."""
    from cogvx.models.transformer import ExpertTransformer

    calls, forward = [], ExpertTransformer.forward

    def watched(self, latents, *args, **options):
        calls.append((latents.shape[2], bool(latents[:, 4:].any())))
        return forward(self, latents, *args, **options)

    monkeypatch.setattr(ExpertTransformer, "forward", watched)
    return calls


@pytest.mark.parametrize(("kind", "num_frames", "lengths"), [
    ("2b", 33, [5, 5, 5]),  # 9 latents: windows at 0, 2 and 4
    ("5b", 41, [5, 5, 5]),  # 11 latents: windows at 0, 3 and 6
    ("1.5-5b", 49, [6] * 4),  # 13 latents, filled up to 14: windows at 0, 2, 5 and 8
])  # fmt: skip
def test_the_model_sees_windows_of_its_trained_length(kind, num_frames, lengths, load, seen):
    clip = load(kind)(PROMPT, num_frames=num_frames, longer="windows", **QUICK)
    assert clip.frames.shape == (num_frames, 48, 64, 3) and clip.metadata["longer"] == "windows"
    assert [length for length, _ in seen] == lengths * 2


def test_an_image_is_seen_in_its_window_alone(load, seen):
    load("5b-i2v")(PROMPT, image=np.full((48, 64, 3), 200, np.uint8), num_frames=33, longer="windows", **QUICK)
    assert seen == [(5, True), (5, False), (5, False)] * 2


def test_riflex_sees_all_at_once_with_other_positions(load, seen):
    clips = [load("5b")(PROMPT, num_frames=33, longer=how, **QUICK) for how in ("riflex", "windows")]
    assert [length for length, _ in seen[:2]] == [9, 9] and len(seen) == 2 + 6
    assert not np.array_equal(clips[0].frames, clips[1].frames)


def test_riflex_lowers_the_frequency_of_its_authors_in_5b():
    config = PRESETS["5b"].transformer
    assert placement(config, DIFFUSERS, (26, 60, 90), riflex=True).intrinsic == 2
    assert placement(config, DIFFUSERS, (26, 60, 90)).intrinsic is None
    assert window_length(config) == 13 and window_length(PRESETS["1.5-5b"].transformer) == 22


@pytest.mark.parametrize("longer", ["windows", "riflex"])
def test_a_clip_that_fits_is_made_as_ever(longer, load):
    assert np.array_equal(*(load("5b")(PROMPT, longer=how, **QUICK).frames for how in (longer, None)))
    with pytest.raises(SettingsError, match="num_frames is 18; this model makes 8N"):
        load("5b")(PROMPT, num_frames=18, longer=longer, **QUICK)


@pytest.mark.parametrize(("kind", "wrong", "message"), [
    ("5b", {"num_frames": 25}, "num_frames is 25; this model makes 8N+1 frames from 1 to 17, the nearest is 17; for"),
    ("5b", {"longer": "loop"}, "longer is 'loop'; valid: None, 'windows', 'riflex'"),
    ("2b", {"longer": "riflex"}, "longer is 'riflex'; this model has no rotary positions: use 'windows'"),
])  # fmt: skip
def test_what_does_not_fit_is_named(kind, wrong, message, load):
    with pytest.raises(SettingsError, match=re.escape(message)):
        load(kind)(PROMPT, **QUICK, **wrong)


def test_a_replay_takes_the_windows_too(small_checkpoint, run_command, tmp_path):
    words = ("--model", small_checkpoint("2b"), "--num-frames", 33, "--longer", "windows", "--num-inference-steps", 2)
    status, _, err = run_command("generate", PROMPT, "-o", tmp_path / "a.mp4", *words, "--no-progress")
    assert status == 0, err
    status, out, err = run_command("replay", tmp_path / "a.mp4", "--no-progress")
    assert status == 0 and "bytes equal" in out, err


def jumps(latents, overlap):
    """The largest change between neighbouring latents where a window starts or ends, in that of all other places."""
    count = latents.shape[2]
    change = latents.diff(dim=2).square().mean((0, 1, 3, 4)).sqrt()
    starts = window_starts(count, 5, overlap)
    joints = sorted({s - 1 for s in starts[1:]} | {s + 4 for s in starts[:-1]})
    others = [i for i in range(count - 1) if i not in joints]
    return (change[joints].max() / change[others].max()).item()


@pytest.fixture
def last_latents(load):
    """What the last step leaves of noise that is the same in every frame, of which windows alone make a movement."""

    def run(num_frames, **inputs):
        one = torch.randn(1, 4, 1, 6, 8, generator=torch.Generator().manual_seed(1))
        inputs = Inputs.read(**inputs, latents=one.expand(-1, -1, (num_frames - 1) // 4 + 1, -1, -1))
        pipeline = load("2b")
        asked = Settings(PROMPT, num_inference_steps=2, guidance_scale=1.0, seed=3, strength=0.5, longer="windows")
        settings, inputs = planned(asked, inputs, pipeline.configs, pipeline.numerics)
        with torch.inference_mode():
            return pipeline.make_latents([settings], inputs, {}, None, progress=False)

    return run


def test_where_windows_meet_nothing_jumps(last_latents, monkeypatch):
    assert jumps(last_latents(57), overlap=2) < 1.2
    monkeypatch.setattr("cogvx.denoise.windowed", lambda view, length, overlap, dim: windowed(view, length, 0, dim))
    assert jumps(last_latents(57), overlap=0) > 1.5  # windows without an overlap do jump


def test_where_windows_of_a_real_clip_meet_nothing_jumps(last_latents):
    if not (CLIPS / "t2v_1.mp4").is_file():
        pytest.skip(f"t2v_1.mp4 is not in {CLIPS}")
    frames, _ = read_video(CLIPS / "t2v_1.mp4")
    assert jumps(last_latents(33, video=frames[:33]), overlap=2) < 1.2


@pytest.mark.slow
@pytest.mark.skipif(not (TINY / "transformer").is_dir(), reason=f"{TINY} holds no checkpoint; `make tiny` trains it")
def test_with_the_embedded_checkpoint_windows_have_no_seams():
    pipeline = Pipeline.from_pretrained("tiny", device="cpu")
    prompt = "a small cyan circle moves right on a black background"
    settings = {"num_inference_steps": 20, "seed": 2, "progress": False}
    short, long = (pipeline(prompt, num_frames=n, longer="windows", **settings).frames for n in (17, 33))
    steps = [np.abs(np.diff(frames.astype(int), axis=0)).mean((1, 2, 3)) for frames in (short, long)]
    assert torch.tensor(steps[1]).max() < 2 * torch.tensor(steps[0]).max(), steps
