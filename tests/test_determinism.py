"""The same seed gives the same bytes: in another process, at another number of threads, and from the file alone."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cogvx import Pipeline
from cogvx.data.video import read_metadata, read_video, write_video
from cogvx.models.vae import PointwiseConv

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle moves left"
QUICK = {"num_inference_steps": 2, "num_frames": 9, "progress": False}


@pytest.fixture(scope="module")
def pipeline(small_checkpoint):
    return Pipeline.from_pretrained(small_checkpoint("5b"), numerics="diffusers")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def cogvx(*words, threads=1):
    command = [sys.executable, "-m", "cogvx", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_two_processes_with_one_thread_and_two_write_the_same_large_video(small_checkpoint, tmp_path):
    words = ["generate", PROMPT, "--model", small_checkpoint("5b"), "--height", 480, "--width", 720, "--num-frames", 9,
             "--num-inference-steps", 2, "--seed", 7]  # fmt: skip
    for count in (1, 2):
        done = cogvx(*words, "-o", tmp_path / f"{count}.mp4", threads=count)
        assert done.returncode == 0, done.stderr
    assert read_video(tmp_path / "1.mp4")[0].shape == (9, 480, 720, 3)
    assert (tmp_path / "1.mp4").read_bytes() == (tmp_path / "2.mp4").read_bytes()


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_one_thread_and_two_make_the_same_bytes(kind, small_checkpoint, threads, tmp_path):
    pipeline = Pipeline.from_pretrained(small_checkpoint(kind), numerics="diffusers")
    for count in (1, 2):
        threads(count)
        clip = pipeline(PROMPT, seed=1, num_inference_steps=3, height=96, width=64, progress=False)
        clip.save(tmp_path / f"{count}.mp4")
    assert (tmp_path / "1.mp4").read_bytes() == (tmp_path / "2.mp4").read_bytes()


@pytest.mark.parametrize("widths", [(512, 256), (96, 64)])
def test_the_shortcuts_of_the_vae_do_not_depend_on_threads(widths, threads):
    conv, x = PointwiseConv(*widths), torch.randn(1, widths[0], 2, 120, 90)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(conv(x))
    assert torch.equal(*results)
    assert torch.allclose(results[0], torch.nn.Conv3d.forward(conv, x), rtol=1e-4, atol=1e-4)


def test_the_same_frames_are_written_as_the_same_bytes_every_time(tmp_path):
    # Soft shapes that move, with flat white and black: where x264's macroblock tree gave 18 different files in 80.
    generator = torch.Generator().manual_seed(0)
    soft = F.interpolate(torch.randn(1, 3, 25, 6, 6, generator=generator), size=(25, 96, 96), mode="trilinear")
    frames = (soft[0].permute(1, 2, 3, 0) * 300 + 128).clamp(0, 255).byte().contiguous().numpy()
    written, between = set(), []
    for i in range(30):
        write_video(tmp_path / "a.mp4", frames, 8)
        written.add((tmp_path / "a.mp4").read_bytes())
        between.append(torch.empty(1000 + 3571 * i))  # so that the next one works at other addresses
    assert len(written) == 1


def test_other_use_of_the_random_state_changes_nothing(pipeline):
    first = pipeline(PROMPT, seed=1, **QUICK).frames
    torch.manual_seed(99)
    torch.randn(7)
    assert np.array_equal(pipeline(PROMPT, seed=1, **QUICK).frames, first)
    assert not np.array_equal(pipeline(PROMPT, seed=2, **QUICK).frames, first)


def test_clip_i_of_a_batch_is_what_its_seed_gives_alone(pipeline):
    prompts = [PROMPT, "a circle"]
    one_by_one = pipeline.batch(prompts, num_videos_per_prompt=2, seed=7, **QUICK)
    together = pipeline.batch(prompts, num_videos_per_prompt=2, seed=7, batch_size=3, **QUICK)
    assert [clip.metadata["seed"] for clip in one_by_one] == [7, 8, 9, 10]
    for i, (clip, other) in enumerate(zip(one_by_one, together, strict=True)):
        alone = pipeline(prompts[i // 2], seed=7 + i, **QUICK)
        assert np.array_equal(clip.frames, alone.frames) and clip.metadata == alone.metadata
        assert np.abs(other.frames.astype(int) - alone.frames.astype(int)).max() <= 1
    assert [clip.metadata["batch_size"] for clip in together] == [3, 3, 3, 1]


def replayed(run_command, *words):
    status, out, err = run_command("replay", *words, "--no-progress")
    return status, out.strip(), err.strip()


def test_replay_makes_the_same_bytes(pipeline, run_command, tmp_path):
    pipeline(PROMPT, seed=4, negative_prompt="blue", guidance_scale=3, sampler="ddim", **QUICK).save(tmp_path / "a.mp4")
    status, out, err = replayed(run_command, tmp_path / "a.mp4")
    assert (status, out, err) == (0, f"{tmp_path / 'a-replay.mp4'}: frames equal, bytes equal", "")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "a-replay.mp4").read_bytes()


def test_replay_follows_a_checkpoint_that_has_moved(pipeline, run_command, tmp_path):
    clip = pipeline(PROMPT, seed=4, **QUICK)
    replace(clip, metadata={**clip.metadata, "model": "gone"}).save(tmp_path / "a.mp4")
    status, _, err = replayed(run_command, tmp_path / "a.mp4")
    assert status == 2 and "'gone' is no folder" in err
    status, out, err = replayed(run_command, tmp_path / "a.mp4", "--model", pipeline.folder)
    assert (status, err) == (0, "") and "frames equal, bytes equal" in out


def test_replay_warns_of_another_environment_model_and_batch(pipeline, run_command, tmp_path):
    clip = pipeline(PROMPT, seed=4, **QUICK)
    environment = {**clip.metadata["environment"], "torch": "2.0", "capability": "none"}
    changed = {**clip.metadata, "environment": environment, "model_sha256": "0" * 64, "batch_size": 3}
    replace(clip, metadata=changed).save(tmp_path / "a.mp4")
    status, out, err = replayed(run_command, tmp_path / "a.mp4")
    assert status == 0 and "frames equal, bytes DIFFERENT" in out
    assert err.startswith("cogvx: warning: the frames may differ: torch was 2.0, is 2.")
    assert "capability was none" in err and "weights are not those of then" in err and "together with 2 others" in err


def test_replay_says_when_the_frames_differ(pipeline, run_command, tmp_path):
    clip = pipeline(PROMPT, seed=4, **QUICK)
    replace(clip, frames=255 - clip.frames).save(tmp_path / "a.mp4")
    status, out, _ = replayed(run_command, tmp_path / "a.mp4")
    assert status == 1 and "frames DIFFERENT, bytes DIFFERENT" in out


GIVEN = ["prompt_embeds", "negative_prompt_embeds", "callback_on_step_end", "model"]


@pytest.mark.parametrize("given", GIVEN)
def test_what_a_file_cannot_carry_is_recorded_and_not_replayed(given, pipeline, run_command, tmp_path):
    values = {
        "prompt_embeds": torch.zeros(1, 16, 24),
        "negative_prompt_embeds": torch.zeros(1, 16, 24), "callback_on_step_end": lambda *_: None,
    }  # fmt: skip
    if given == "model":
        parts = pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.configs
        clip = Pipeline(*parts)(PROMPT, seed=1, **QUICK)
    else:
        clip = pipeline(PROMPT, seed=1, **QUICK, **{given: values[given]})
    clip.save(tmp_path / "a.mp4")
    assert read_metadata(tmp_path / "a.mp4")["not_replayable_because_of"] == [given]
    status, _, err = replayed(run_command, tmp_path / "a.mp4")
    assert status == 2 and err.endswith(f"cannot be replayed: it was made with given {given}, which it does not carry")
    assert not (tmp_path / "a-replay.mp4").exists()
