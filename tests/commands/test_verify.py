"""The checks of a checkpoint folder: what passes, and what each fault is called."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import cogvx.models.vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_verify_passes_what_diffusers_saved(small_checkpoint, run_command):
    folder = small_checkpoint("5b")
    status, out, err = run_command("verify", folder)
    assert status == 0, out + err
    assert out.count("sha-256 ") == 3 and out.strip().endswith("all well")
    passed = [line for line in out.splitlines() if line.startswith("ok ")]
    assert len(passed) == 9 and sum("relative error" in line for line in passed) == 3


def test_verify_names_what_fails(small_checkpoint, run_command, tmp_path):
    folder = Path(shutil.copytree(small_checkpoint("2b"), tmp_path / "folder"))
    vae = load_file(folder / "vae" / WEIGHTS)
    del vae["decoder.conv_in.conv.bias"]
    save_file(vae, folder / "vae" / WEIGHTS)
    transformer = load_file(folder / "transformer" / WEIGHTS)
    transformer["proj_out.bias"][0] = torch.nan
    save_file(transformer, folder / "transformer" / WEIGHTS)
    status, out, err = run_command("verify", folder, "--no-parity")
    assert status == 2
    assert f"{folder} failed: transformer: finite values, vae: names and shapes" in err
    rows = {line[9:45].strip(): line[:8].strip() for line in out.splitlines()}
    assert rows["transformer: finite values"] == "FAILED" and rows["text_encoder: parity with diffusers"] == "skipped"


def test_verify_sees_another_result_than_diffusers(small_checkpoint, run_command, monkeypatch):
    monkeypatch.setattr(cogvx.models.vae, "decode_chunks", lambda num_latents: [num_latents])  # other statistics
    status, out, err = run_command("verify", small_checkpoint("2b"))
    assert status == 2 and err.strip().endswith("2b failed: vae: parity with diffusers"), out + err
