"""A video that goes on: the frames that were there stay, none is repeated, and what moves keeps moving."""

import re

import numpy as np
import pytest

from cogvx import Clip, Pipeline
from cogvx.data.shapes import parse, render
from cogvx.data.video import read_metadata, read_video, write_video
from cogvx.extend import extend
from cogvx.models.checkpoint import TINY
from cogvx.settings import SettingsError

PROMPT = "a red circle moves left"
QUICK = {"num_inference_steps": 2, "seed": 3, "progress": False}


def noise(num_frames=12, height=48, width=64):
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def load(small_checkpoint):
    return lambda kind: Pipeline.from_pretrained(small_checkpoint(kind), numerics="diffusers")


def test_a_text_model_goes_on_from_several_frames(load):
    pipeline, video = load("5b"), noise()
    clip = extend(pipeline, video, PROMPT, num_pieces=2, **QUICK)
    assert clip.frames.shape == (12 + 2 * 8, 48, 64, 3) and np.array_equal(clip.frames[:12], video)
    # The first piece is what an inpainted video of the last 9 frames gives, whatever stands in the place of the rest.
    mask = np.zeros((17, 48, 64), bool)
    mask[9:] = True
    rest = np.repeat(video[-1:], 8, axis=0)
    piece = pipeline(PROMPT, video=np.concatenate([video[-9:], rest]), mask=mask, strength=1.0, **QUICK)
    assert np.array_equal(clip.frames[12:20], piece.frames[9:])
    other = extend(pipeline, clip.frames[:20], PROMPT, **QUICK | {"seed": 4})
    assert np.array_equal(other.frames, clip.frames)
    single = extend(pipeline, video, PROMPT, overlap=1, **QUICK)
    assert len(single.frames) == 12 + 16 and np.array_equal(single.frames[:12], video)


@pytest.mark.parametrize("kind", ["5b-i2v", "1.5-5b-i2v"])
def test_an_image_model_goes_on_from_the_last_frame(kind, load):
    pipeline, video = load(kind), noise(3)
    clip = extend(pipeline, video, PROMPT, num_frames=17, **QUICK)
    piece = pipeline(PROMPT, image=video[-1], num_frames=17, **QUICK)
    assert np.array_equal(clip.frames, np.concatenate([video, piece.frames[1:]]))
    assert clip.fps == (16 if kind.startswith("1.5") else 8)


def test_size_and_rate_are_the_videos(load):
    clip = extend(load("2b"), Clip(noise(1, 32, 32), 12), PROMPT, **QUICK)
    assert clip.frames.shape == (17, 32, 32, 3) and clip.fps == clip.metadata["fps"] == 12
    scaled = extend(load("2b"), noise(9, 50, 70), PROMPT, height=48, width=64, **QUICK)
    assert scaled.frames.shape == (17, 48, 64, 3)


@pytest.mark.parametrize(("kind", "wrong", "message"), [
    ("5b", {"num_pieces": 0}, "num_pieces is 0; it must be at least 1"),
    ("5b", {"num_pieces": 1.5}, "num_pieces is 1.5; it must be a whole number"),
    ("5b", {"overlap": 2}, "overlap is 2; pieces have 17 frames and the video 12: it must be 8N+1 from 1 to 9"),
    ("5b", {"overlap": 17}, "overlap is 17; pieces have 17 frames"),
    ("5b", {"num_frames": 1}, "num_frames is 1; a piece must have more frames than those that it goes on from"),
    ("5b-i2v", {"num_frames": 1}, "num_frames is 1; a piece must have more frames than the one that it goes on from"),
    ("5b-i2v", {"overlap": 9}, "overlap is 9; an image-to-video model goes on from 1 frame, leave it out"),
    ("5b", {"height": 50}, "height is 50; it must be a multiple of 16 pixels, the nearest is 48"),
    ("5b", {"prompt": ""}, "prompt is ''; say in words"),
])  # fmt: skip
def test_what_does_not_fit_is_named(kind, wrong, message, load):
    with pytest.raises(SettingsError, match=re.escape(message)):
        extend(load(kind), noise(), **{"prompt": PROMPT, **QUICK, **wrong})


def test_the_command_and_its_replay(small_checkpoint, run_command, tmp_path):
    video, made = tmp_path / "v.mp4", tmp_path / "m.mp4"
    write_video(video, noise(), 12)
    words = ("extend", video, PROMPT, "-o", made, "--model", small_checkpoint("5b"), "--num-inference-steps", 2)
    status, out, err = run_command(*words, "--num-pieces", 2, "--no-progress")
    assert status == 0 and f"{made}  (28 frames, " in out, err
    assert read_metadata(made)["continued"] == {"num_pieces": 2, "overlap": 9}
    status, out, err = run_command("replay", made, "--video", video, "--no-progress")
    assert status == 0 and "frames equal, bytes equal" in out and err == "", err
    assert "was made from video; give it with --video" in run_command("replay", made)[2]
    write_video(made, read_video(made)[0], 12, read_metadata(made) | {"continued": 2})
    assert "in its metadata continued is '2'" in run_command("replay", made, "--video", video)[2]
    assert "it is the file that is read" in run_command("extend", video, PROMPT, "-o", video)[2]


@pytest.mark.slow
@pytest.mark.skipif(not (TINY / "transformer").is_dir(), reason=f"{TINY} holds no checkpoint; `make tiny` trains it")
@pytest.mark.parametrize(("seed", "prompt"), [
    (3, "a small red circle moves left on a black background"),
    (4, "a small white square moves down on a navy background"),
    (5, "a green triangle grows on a gray background"),
    (6, "a small cyan circle moves right on a black background"),
])  # fmt: skip
def test_with_the_embedded_checkpoint_what_moves_keeps_moving(seed, prompt):
    video = render(parse(prompt), np.random.default_rng(seed))[:9]
    pipeline = Pipeline.from_pretrained("tiny", device="cpu", numerics="diffusers")
    clip = extend(pipeline, video, prompt, seed=1, num_inference_steps=25, progress=False)
    assert len(clip.frames) == 17 and np.array_equal(clip.frames[:9], video)
    figure = np.abs(clip.frames.astype(int) - clip.frames[0, 0, 0]).sum(-1) > 150
    rows, columns = np.array([[axis.mean() for axis in np.nonzero(frame)] for frame in figure]).T
    sizes = figure.sum((1, 2))
    along, across = {"left": (-columns, rows), "right": (columns, rows), "down": (rows, columns),
                     "grows": (sizes / 40, columns)}[prompt.split(" on ")[0].split()[-1]]  # fmt: skip
    assert (np.diff(along)[8:] > 0).all()
    before, after = along[8] - along[0], along[16] - along[8]  # in as many frames
    assert 0.5 * before < after < 3 * before, (before, after)
    assert np.abs(np.diff(across)).max() < 2  # no jump to the side, at the joint neither
