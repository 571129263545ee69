"""Images and videos as files on the command line, and the replay that needs the same ones."""

import json

import numpy as np
import pytest
from PIL import Image

from cogvx.data.video import read_metadata, write_video

PROMPT = "a red circle moves left"
QUICK = ("--num-frames", 9, "--num-inference-steps", 2, "--no-progress")


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(tmp_path / f"{name}.png")
    write_video(tmp_path / "v.mp4", rng.integers(0, 256, (9, 48, 64, 3), np.uint8), 12)
    return tmp_path


def refused(answer):
    status, out, err = answer
    assert status == 2 and out == "" and err.count("\n") == 1, (status, out, err)
    return err


def test_an_image_makes_a_video_that_is_replayed_with_it_alone(files, small_checkpoint, run_command):
    made, words = files / "m.mp4", ("--model", small_checkpoint("5b-i2v"))
    images = ("--image", files / "a.png", "--last-image", files / "b.png")
    status, _, err = run_command("generate", PROMPT, "-o", made, *words, *images, *QUICK)
    assert status == 0, err
    assert list(read_metadata(made)["inputs_sha256"]) == ["image", "last_image"]
    status, out, err = run_command("replay", made, *images, "--no-progress")
    assert status == 0 and "frames equal, bytes equal" in out and err == "", err
    assert f"{made} was made from image; give it with --image" in refused(run_command("replay", made))
    assert "was made from last_image; give it with --last-image" in refused(run_command("replay", made, *images[:2]))
    swapped = ("--image", files / "b.png", "--last-image", files / "b.png")
    assert f"image is {files / 'b.png'}, whose pixels are not those" in refused(run_command("replay", made, *swapped))


def test_a_video_makes_a_video_that_is_replayed_with_it_alone(files, small_checkpoint, run_command):
    made, words = files / "m.mp4", ("--model", small_checkpoint("5b"))
    video = ("--video", files / "v.mp4")
    status, _, err = run_command("generate", PROMPT, "-o", made, *words, *video, "--strength", 0.6, *QUICK)
    assert status == 0, err
    assert (read_metadata(made)["strength"], read_metadata(made)["fps"]) == (0.6, 12)
    status, out, err = run_command("replay", made, *video, "--no-progress")
    assert status == 0 and "frames equal, bytes equal" in out and err == "", err
    assert "was made from video; give it with --video" in refused(run_command("replay", made))
    plain = files / "plain.mp4"
    assert run_command("generate", PROMPT, "-o", plain, *words, *QUICK)[0] == 0
    assert "was made without video; leave --video out" in refused(run_command("replay", plain, *video))


def test_a_video_from_before_there_were_inputs_is_replayed(files, small_checkpoint, run_command):
    made = files / "m.mp4"
    assert run_command("generate", PROMPT, "-o", made, "--model", small_checkpoint("5b"), *QUICK)[0] == 0
    old = read_metadata(made)
    frames = np.zeros((9, 48, 64, 3), np.uint8)
    write_video(made, frames, 8, {k: v for k, v in old.items() if k not in ("strength", "ofs", "inputs_sha256")})
    status, out, err = run_command("replay", made, "--no-progress")
    assert status == 1 and "frames DIFFERENT" in out and err == ""  # black ones stand in for those of then
    write_video(made, frames, 8, json.loads(json.dumps(old)) | {"inputs_sha256": 3})
    assert "in its metadata inputs_sha256 is '3'" in refused(run_command("replay", made))


@pytest.mark.parametrize(("words", "message"), [
    (["--image", "none.png"], "cannot read"),
    (["--image", "text.png"], "is damaged, or no PNG, JPEG, WEBP, BMP image"),
    (["--image", "cut.png"], "cut.png"),
    (["--image", "v.mp4"], "is damaged, or no PNG, JPEG, WEBP, BMP image"),
    (["--image", "a.png", "--video", "a.png"], "a.png"),
    ([], "image is None; this is an image-to-video model: give the first frame as image"),
])  # fmt: skip
def test_files_that_are_none_are_named_before_any_weight_is_read(words, message, files, small_checkpoint, run_command,
                                                                 monkeypatch):  # fmt: skip
    monkeypatch.chdir(files)
    (files / "text.png").write_text("no image at all")
    (files / "cut.png").write_bytes((files / "a.png").read_bytes()[:2000])
    monkeypatch.setattr("cogvx.pipeline.Pipeline.from_pretrained", None)
    words = ("generate", PROMPT, "-o", "m.mp4", "--model", small_checkpoint("5b-i2v"), *words)
    assert message in refused(run_command(*words)) and not (files / "m.mp4").exists()
