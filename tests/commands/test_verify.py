"""The checks of a checkpoint folder: what passes, and what each fault is called."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub._local_folder import write_download_metadata
from safetensors.torch import load_file, save_file

import cogvx.commands.verify
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


def in_a_folder(folder, tmp_path, name, sha256):
    """As `hf download --local-dir` leaves it."""
    write_download_metadata(folder, name, "0" * 40, sha256)
    return folder


def in_the_cache(folder, tmp_path, name, sha256):
    """As `from_pretrained("owner/name")` leaves it."""
    snapshot, blobs = (tmp_path / "models--a--b" / place for place in ("snapshots/0123", "blobs"))
    blobs.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    (snapshot / name).rename(blobs / sha256)
    (snapshot / name).symlink_to(Path("../../../blobs") / sha256)
    return snapshot


@pytest.mark.parametrize("download", [in_a_folder, in_the_cache])
def test_verify_compares_weights_with_the_hash_of_their_download(
    download, small_checkpoint, run_command, tmp_path, monkeypatch
):
    monkeypatch.setattr(cogvx.commands.verify, "outcomes", lambda *_: [])  # the other checks have their own tests
    name = f"vae/{WEIGHTS}"
    folder = Path(shutil.copytree(small_checkpoint("2b"), tmp_path / "folder"))
    folder = download(folder, tmp_path, name, hashlib.sha256((folder / name).read_bytes()).hexdigest())
    status, out, err = run_command("verify", folder)
    assert status == 0 and out.count("sha-256 ") == 3 and out.count(f"{name}  ok, as downloaded\n") == 1, out + err
    with open(folder / name, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    status, out, err = run_command("verify", folder)
    assert status == 2 and err.strip().endswith(f"failed: {name}: SHA-256") and f"{name}  FAILED, downloaded was" in out
