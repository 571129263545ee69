"""`cogvx train` from a folder of clips to weights that diffusers loads."""

import json
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from cogvx.data.video import write_video
from cogvx.models.lora import load_lora
from cogvx.models.text import TextEncoder
from cogvx.models.transformer import ExpertTransformer
from cogvx.models.vae import CausalVAE
from cogvx.train.ranks import Ranks


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for name, size in (("a", (9, 32, 48)), ("b", (1, 16, 32))):  # a clip and, of one frame, a picture
        write_video(folder / f"{name}.mp4", rng.integers(0, 256, (*size, 3), dtype=np.uint8), 8)
        (folder / f"{name}.txt").write_text(f"a red circle {name}")
    return folder


@pytest.fixture
def options(clips, small_checkpoint, tmp_path):
    (tmp_path / "run.toml").write_text(
        f'data = "{clips}"\nout = "{tmp_path / "run"}"\nmodel = "{small_checkpoint("2b")}"\ndevice = "cpu"\n'
        'num_steps = 2\nprecision = "fp32"\n[lora]\nrank = 4\nalpha = 2\n[optimiser]\nlr = 0.05\nnum_warmup = 1\n'
    )
    return tmp_path / "run.toml"


def test_the_adapter_computes_the_same_in_diffusers(run_command, options, small_checkpoint, tmp_path):
    status, out, _ = run_command("train", "lora", options)
    assert status == 0 and out == f"{tmp_path / 'run'}  step 2\n"
    adapter, generator = tmp_path / "run" / "pytorch_lora_weights.safetensors", torch.Generator().manual_seed(0)
    ours = ExpertTransformer.from_pretrained(small_checkpoint("2b"), dtype=torch.float32)
    inputs = torch.randn(1, 4, 3, 6, 8, generator=generator), torch.randn(1, 16, 24, generator=generator)
    with torch.no_grad():
        before = ours(*inputs, torch.tensor([500]))
        load_lora(ours, adapter)
        after = ours(*inputs, torch.tensor([500]))
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(small_checkpoint("2b"))
    pipeline.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
    with torch.no_grad():
        theirs = pipeline.transformer(inputs[0].transpose(1, 2), inputs[1], torch.tensor([500])).sample.transpose(1, 2)
    assert (after - before).norm() / before.norm() > 0.01
    assert (after - theirs).norm() / theirs.norm() < 1e-5


def test_a_trained_transformer_is_a_published_folder_and_the_cache_is_read_again(
    run_command, options, tmp_path, monkeypatch
):
    words = ("train", "transformer", options, "start=scratch", f"cache={tmp_path / 'cache'}")
    assert run_command(*words)[0] == 0
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert len(files) == 5  # latents of two clips; embeddings of two captions and of none
    from diffusers import CogVideoXTransformer3DModel

    CogVideoXTransformer3DModel.from_pretrained(tmp_path / "run" / "transformer")
    for model in (CausalVAE, TextEncoder):  # nothing is left for them to do
        monkeypatch.setattr(model, "from_pretrained", lambda *given, **named: pytest.fail("a model was loaded"))
    assert run_command(*words, f"out={tmp_path / 'again'}")[0] == 0
    assert files == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    rows = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("run", "again")]
    losses = [[json.loads(line)["loss"] for line in each] for each in rows]
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.parametrize(("kind", "learnt"), [("5b-i2v", "pos_embedding"), ("1.5-5b-i2v", "ofs_embedding")])
def test_an_image_model_is_trained_whole_as_diffusers_reads_it(
    run_command, options, small_checkpoint, kind, learnt, tmp_path
):
    """With what it has besides: a learned table of positions, or what is learned of the ofs and patches in time."""
    words = ("train", "transformer", options, f"model={small_checkpoint(kind)}", "batch=2", "task=image_to_video")
    status, out, err = run_command(*words)
    assert status == 0 and out == f"{tmp_path / 'run'}  step 2\n", err
    kinds = sorted(file.name.split("-")[0] for file in (tmp_path / "run" / "cache").iterdir())
    assert kinds == ["images", "images", "latents", "latents", "text", "text", "text"]
    from diffusers import CogVideoXTransformer3DModel

    before, after = (
        CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32).state_dict()
        for folder in (small_checkpoint(kind) / "transformer", tmp_path / "run" / "transformer")
    )
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(learnt in name for name in changed) and "patch_embed.proj.weight" in changed


def test_nothing_is_computed_or_written_before_all_is_checked(run_command, options, clips, tmp_path):
    status, out, err = run_command("train", "lora", options, "batch=2", "--dry-run")
    assert status == 0 and not err and "2 clips of 18 to 34 tokens" in out and "2 steps of 2 samples: 2.0 epochs" in out
    err = run_command("train", "lora", options, "optimiser.num_warmup=2", "--dry-run")[2]
    assert "warning: optimiser.num_warmup is 2, num_steps 2: the learning rate rises to the end" in err
    status, out, _ = run_command("train", "lora", options, "seed=7", "--print-config")
    assert status == 0 and "seed = 7\n" in out and "\n[lora]\nrank = 4\n" in out
    for words, message in (
        (["lora", options, "optimizer.lr=1"], "optimizer is no option; did you mean optimiser?"),
        (["lora", options, "pack_tokens=33"], "pack_tokens is 33; it must be at least 34, as many as the longest clip"),
        (["lora", options, "lora.targets=['to_x']"], "lora.targets holds 'to_x', which no layer is called"),
        (["lora", options, f"data={tmp_path}"], "which holds no video"),
        (["lora", options, "task=image_to_video"], "has 4 input channels for 4 of latents, it is made for 'text_to_v"),
        (["lora", options, "shard=2"], "shard is 2; it must be 1 for a LoRA, which is not sharded"),
        (
            ["transformer", options, "shard=2", "precision=fp16"],
            "shard is 2; it must be 1 in fp16, which is not sharded",
        ),
        (["transformer", options, "shard=0", "optimiser.bits=8"], "optimiser.bits is 8; it must be 32 where"),
        (["transformer", options, "shard=2"], "shard is 2; it must divide the number of processes, which is 1"),
        (["lora", "none.toml"], "none.toml cannot be read: No such file or directory"),
        (["lora"], "data is missing"),
    ):
        status, _, err = run_command("train", *words)
        assert status == 2 and message in err and err.startswith("cogvx: error: "), err
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


def test_a_dry_run_says_what_each_process_holds_and_refuses_what_they_cannot_share(run_command, options, monkeypatch):
    def held(*words: str) -> list[float]:
        status, out, err = run_command("train", "transformer", options, *words, "--dry-run")
        assert status == 0, err
        assert ("in each of 8 processes" in out) == (words == ("shard=8",))
        return [float(x) for x in re.search(r"([0-9.]+) MB of weights, ([0-9.]+) MB of gradients", out).groups()]

    assert held("shard=8") == [pytest.approx(whole / 8, abs=0.01) for whole in held("shard=1")]  # rounded up
    assert min(held()) > 0.5 and held("shard=0") == held()
    four = Ranks()
    four.size = 4  # as under torchrun
    monkeypatch.setattr("cogvx.train.ranks.joined", lambda device: nullcontext(four))
    status, out, _ = run_command("train", "transformer", options, "shard=0", "--dry-run")
    assert status == 0 and "in each of 4 processes" in out
    status, _, err = run_command("train", "transformer", options, "shard=3", "--dry-run")
    assert status == 2 and "shard is 3; it must divide the number of processes, which is 4" in err


def test_a_vae_is_trained_on_clips_without_captions(run_command, clips, small_checkpoint, tmp_path):
    words = [
        "vae",
        f"data={clips}",
        f"out={tmp_path / 'run'}",
        f"model={small_checkpoint('2b')}",
        "num_steps=1",
        "size=32",
    ]
    words += ["num_frames=9", "weights.adversarial_start=none", "device=cpu", "on_fault=skip"]
    status, out, err = run_command("train", *words, "--dry-run")
    assert status == 0 and "1 clips; 1 steps of 1 crops of 9 frames and 32 x 32 pixels" in out
    assert "1 have fewer than 9 frames: b.mp4" in err and "num_warmup is 100, num_steps 1:" in err
    status, _, err = run_command("train", *words, "strides=[3,2]", "--dry-run")
    assert status == 2 and "0 clips can be trained on; 2 have fewer than 17 frames: a.mp4, b.mp4" in err
    status, out, _ = run_command("train", *words)
    assert status == 0 and out == f"{tmp_path / 'run'}  step 1\n"
    from diffusers import AutoencoderKLCogVideoX

    AutoencoderKLCogVideoX.from_pretrained(tmp_path / "run" / "vae")
    assert 'adversarial_start = "none"\n' in run_command("train", *words, "--print-config")[1]
