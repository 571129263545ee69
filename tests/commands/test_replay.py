"""Videos made with files beside the model's folder are made again with these files alone, wherever they are now."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvx import Pipeline
from cogvx.data.video import read_metadata
from cogvx.models.lora import fuse_lora, load_lora

PROMPT = "a red circle moves left"
QUICK = {"num_frames": 9, "num_inference_steps": 2, "seed": 3, "progress": False}
FLAGS = ("--num-frames", 9, "--num-inference-steps", 2, "--seed", 3, "--no-progress")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_lora(file, seed, rank=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"A": (rank, 256), "B": (64, rank)}
    save_file({f"transformer.transformer_blocks.{i}.ff.net.2.lora_{letter}.weight": torch.randn(s, generator=generator)
               for i in range(2) for letter, s in shapes.items()}, file)  # fmt: skip
    return file


@pytest.fixture
def files(small_checkpoint, tmp_path):
    """A transformer in bf16 for a folder in fp32, the folder's VAE as a file, two LoRAs."""
    folder, there = small_checkpoint("5b"), tmp_path / "there"
    there.mkdir()
    for part, dtype in (("transformer", torch.bfloat16), ("vae", torch.float32)):
        weights = load_file(folder / part / WEIGHTS)
        save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, there / f"{part}.safetensors")
    for seed, name in enumerate(("one", "two")):
        write_lora(there / f"{name}.safetensors", seed)
    return there


@pytest.fixture
def replay(run_command):
    def run(*words):
        status, out, err = run_command("replay", *words, "--no-progress")
        return (status, out.rpartition(": ")[2].strip(), err) if status == 0 else err.removeprefix("cogvx: error: ")

    return run


def test_files_are_taken_from_where_they_were_or_from_flags(files, small_checkpoint, run_command, replay, tmp_path):
    made, moved = tmp_path / "m.mp4", tmp_path / "moved"
    parts = ("--transformer", files / "transformer.safetensors", "--vae", files / "vae.safetensors")
    loras = ("--lora", files / "one.safetensors", files / "two.safetensors", "--lora-weight", 0.5, -0.3)
    words = ("--model", small_checkpoint("5b"), *parts, *loras, *FLAGS)
    status, _, err = run_command("generate", PROMPT, "-o", made, *words)
    assert status == 0, err
    carried = read_metadata(made)
    assert (carried["dtype"], carried["vae_dtype"]) == ("bfloat16", "float32")
    equal = (0, "frames equal, bytes equal", "")
    assert replay(made) == equal

    files.rename(moved)
    assert f"{made} was made with the transformer {parts[1]}, which is not there; give it with --transformer" in replay(
        made
    )
    parts = ("--transformer", moved / "transformer.safetensors", "--vae", moved / "vae.safetensors")
    assert f"was made with the vae {files / 'vae.safetensors'}, which is not there" in replay(made, *parts[:2])
    assert f"was made with a LoRA {files / 'one.safetensors'}, which is not there; give it with --lora" in replay(
        made, *parts
    )
    one, two = moved / "one.safetensors", moved / "two.safetensors"
    assert replay(made, *parts, "--lora", two, one) == equal
    files.mkdir()
    two.rename(files / "two.safetensors")
    assert replay(made, *parts, "--lora", one) == equal

    swapped = ("--transformer", parts[3], *parts[2:], "--lora", one)
    assert f"transformer is {parts[3]}, which is not the file that {made} was made with" in replay(made, *swapped)
    write_lora(files / "two.safetensors", 7)
    assert f"{files / 'two.safetensors'} is not a LoRA any more that {made} was made with; give that with --lora" in (
        replay(made, *parts, "--lora", one)
    )
    assert f"lora is {files / 'two.safetensors'}, which is none of the LoRAs that {made} was made with" in replay(
        made, *parts, "--lora", one, files / "two.safetensors"
    )
    assert f"vae is {tmp_path}, which is no file" in replay(made, *parts[:2], "--vae", tmp_path)


def test_files_that_a_video_was_made_without_are_refused(files, small_checkpoint, replay, tmp_path):
    clip = Pipeline.from_pretrained(small_checkpoint("5b"))(PROMPT, **QUICK)
    made = clip.save(tmp_path / "m.mp4")
    for part in ("transformer", "vae"):
        message = f"was made without a file for the {part}; leave --{part} out"
        assert message in replay(made, f"--{part}", files / f"{part}.safetensors")
    assert "which is none of the LoRAs" in replay(made, "--lora", files / "one.safetensors")


def test_an_alpha_and_fused_weights_are_replayed(small_checkpoint, replay, tmp_path):
    pipeline = Pipeline.from_pretrained(small_checkpoint("5b"))
    load_lora(pipeline.transformer, write_lora(tmp_path / "a.safetensors", 1), weight=0.4, name="style", alpha=3.0)
    clips = [pipeline(PROMPT, **QUICK)]
    fuse_lora(pipeline.transformer)
    clips.append(pipeline(PROMPT, **QUICK))
    carried = [clip.metadata["loras"][0] for clip in clips]
    assert [(lora["name"], lora["alpha"], lora.get("fused")) for lora in carried] == [
        ("style", 3.0, None),
        ("style", 3.0, True),
    ]
    for clip in clips:
        assert replay(clip.save(tmp_path / "m.mp4")) == (0, "frames equal, bytes equal", "")


def test_a_video_from_before_that_gives_its_files_as_a_reason(files, small_checkpoint, replay, tmp_path):
    pipeline = Pipeline.from_pretrained(small_checkpoint("5b"), vae=files / "vae.safetensors")
    load_lora(pipeline.transformer, files / "one.safetensors")
    clip = pipeline(PROMPT, **QUICK)
    old = clip.metadata | {"not_replayable_because_of": ["vae_file", "loras"]}
    status, out, _ = replay(replace(clip, metadata=old).save(tmp_path / "m.mp4"))
    assert status == 0 and out.startswith("frames equal")


@pytest.mark.parametrize(("change", "message"), [
    ({"vae_file": 3}, "in its metadata vae_file is '3'"),
    ({"vae_file": {"file": "a.safetensors"}}, "in its metadata vae_file is "),
    ({"vae_file": {"file": "a\0.safetensors", "sha256": ""}}, "in its metadata vae_file is "),
    ({"transformer_file": {"file": "owner/name", "sha256": "0" * 64}}, "the transformer owner/name, which is not"),
    ({"transformer_file": {"file": "/dev/zero", "sha256": "0" * 64}}, "the transformer /dev/zero, which is not there"),
    ({"vae_file": {"file": "pipe.safetensors", "sha256": "0" * 64}}, "the vae pipe.safetensors, which is not there"),
    ({"loras": {}}, "in its metadata loras is '{}'"),
    ({"loras": [1]}, "in its metadata loras is '1'"),
    ({"loras": [{"file": "x.pt", "sha256": "0" * 64}]}, "a LoRA x.pt, which is not there"),
    ({"loras": [{"name": "../x"}]}, "its LoRA lora.safetensors: name is '../x'; it must be letters"),
    ({"loras": [{"name": "x", "weight": "1"}]}, "its LoRA lora.safetensors: weight is '1'; it must be a finite number"),
    ({"loras": [{"name": 3}]}, "in its metadata loras is "),
    ({"vae_dtype": "int8"}, "in its metadata vae_dtype is 'int8'"),
    ({"continued": {"num_pieces": 1, "overlap": 1}, "inputs_sha256": {}}, "in its metadata continued is "),
])  # fmt: skip
def test_metadata_that_somebody_else_wrote(change, message, small_checkpoint, replay, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.safetensors")  # whoever opens it waits for ever
    clip = Pipeline.from_pretrained(small_checkpoint("5b"))(PROMPT, **QUICK | {"num_inference_steps": 1})
    known = {"file": "lora.safetensors", "sha256": sha256_of(write_lora(Path("lora.safetensors"), 0)), "weight": 1.0}
    if "name" in str(change.get("loras")):
        change = {"loras": [known | change["loras"][0]]}
    replace(clip, metadata=clip.metadata | change).save("m.mp4")
    answer = replay("m.mp4")
    assert isinstance(answer, str) and answer.startswith("m.mp4") and message in answer and answer.count("\n") == 1
    assert not Path("m-replay.mp4").exists()


def sha256_of(file):
    from cogvx.models.loading import SourceFile

    return SourceFile(file).sha256
