"""Files beside a model's folder: a transformer, a VAE, LoRAs; what they change, and that the video says so."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import cogvx.pipeline
from cogvx import Pipeline
from cogvx.data.video import read_metadata
from cogvx.models.loading import SourceFile
from cogvx.models.lora import load_lora, unload_lora

PROMPT = "a red circle moves left"
QUICK = {"num_frames": 9, "num_inference_steps": 2, "seed": 3, "progress": False}
FLAGS = ("--num-frames", 9, "--num-inference-steps", 2, "--seed", 3, "--no-progress")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def lora(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"transformer.transformer_blocks.{i}.ff.net.2.lora_{letter}.weight": torch.randn(shape, generator=generator)
        for i in range(2) for letter, shape in (("A", (2, 256)), ("B", (64, 2)))
    }  # fmt: skip
    save_file(tensors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def without(folder, part, tmp_path):
    """A copy of a pipeline's folder that lacks the weights of one part."""
    copy = Path(shutil.copytree(folder, tmp_path / f"no-{part}"))
    (copy / part / WEIGHTS).rename(tmp_path / f"{part}.safetensors")
    return copy, tmp_path / f"{part}.safetensors"


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_file_takes_the_place_of_a_part(small_checkpoint, tmp_path, part):
    folder = small_checkpoint("5b")
    expected = Pipeline.from_pretrained(folder)(PROMPT, **QUICK)
    rest, file = without(folder, part, tmp_path)
    clip = Pipeline.from_pretrained(rest, **{part: file})(PROMPT, **QUICK)
    assert np.array_equal(clip.frames, expected.frames)
    digest = sha256(file.read_bytes()).hexdigest()
    assert clip.metadata[f"{part}_file"] == {"file": str(file), "sha256": digest}
    assert f"{part}_file" not in expected.metadata and clip.metadata["not_replayable_because_of"] == []


def test_a_file_of_another_model_costs_no_weight(small_checkpoint, tmp_path):
    folder = small_checkpoint("5b")
    weights = load_file(folder / "transformer" / WEIGHTS)
    del weights["proj_out.bias"]
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors: 1 missing \(proj_out\.bias\)"):
        Pipeline.from_pretrained(folder, transformer=tmp_path / "x.safetensors")


def test_the_command_takes_files_and_loras(small_checkpoint, tmp_path, run_command, lora):
    folder, out = small_checkpoint("5b"), tmp_path / "a.mp4"
    rest, file = without(folder, "transformer", tmp_path)
    beside = ("--transformer", file, "--lora", lora, "--lora-weight", 0.5)
    status, _, err = run_command("generate", PROMPT, "-o", out, "--model", rest, *beside, *FLAGS)
    assert status == 0, err
    carried = read_metadata(out)
    assert carried["loras"] == [
        {"name": "style", "file": str(lora), "sha256": sha256(lora.read_bytes()).hexdigest(), "weight": 0.5}
    ]
    pipeline = Pipeline.from_pretrained(folder)
    plain = pipeline(PROMPT, **QUICK)
    load_lora(pipeline.transformer, lora, 0.5)
    clip = pipeline(PROMPT, **QUICK)
    assert json.loads(json.dumps(clip.metadata["loras"])) == carried["loras"]
    assert not np.array_equal(clip.frames, plain.frames)
    unload_lora(pipeline.transformer)
    assert np.array_equal(pipeline(PROMPT, **QUICK).frames, plain.frames)


def test_what_the_command_refuses(small_checkpoint, tmp_path, run_command, lora):
    folder = small_checkpoint("5b")
    other = tmp_path / "other.safetensors"
    save_file({"transformer.proj_out.lora_A.weight": torch.ones(2, 9),
               "transformer.proj_out.lora_B.weight": torch.ones(16, 2)}, other)  # fmt: skip
    for words, message in (
        (("--lora", lora, "--lora-weight", 1, 2), "lora_weight has 2 numbers for 1 LoRAs; give one for each"),
        (
            ("--lora", other),
            "is a LoRA for another model: 1 layers have another size (proj_out is [16, 9], here [16, 64])",
        ),
        (("--lora", lora, "--lora-weight", "nan"), "weight is nan; it must be a finite number"),
        (("--lora", tmp_path / "gone"), "gone does not exist; give a safetensors file"),
        (("--transformer", tmp_path / "gone.gguf"), "gone.gguf does not exist; give a safetensors or GGUF file"),
        (("--transformer", tmp_path / "x.pt"), "x.pt is a pickle"),
        (("--vae", folder), "is no single file"),
    ):
        status, out, err = run_command("generate", PROMPT, "-o", tmp_path / "a.mp4", "--model", folder, *words, *FLAGS)
        assert status == 2 and message in err and err.count("\n") == 1 and not out, err
    assert not (tmp_path / "a.mp4").exists()


def test_every_file_is_hashed_once(small_checkpoint, tmp_path, lora, monkeypatch):
    rest, file = without(small_checkpoint("5b"), "transformer", tmp_path)
    hashed = []
    folders = cogvx.pipeline.content_hash
    monkeypatch.setattr(cogvx.pipeline, "content_hash", lambda path: hashed.append(path) or folders(path))
    files = SourceFile.sha256.func
    monkeypatch.setattr(SourceFile.sha256, "func", lambda self: hashed.append(self.path) or files(self))
    pipeline = Pipeline.from_pretrained(rest, transformer=file)
    load_lora(pipeline.transformer, lora)
    clips = pipeline.batch([PROMPT, PROMPT], **QUICK)
    assert len(clips) == 2 and sorted(hashed) == sorted([rest, file, lora])
