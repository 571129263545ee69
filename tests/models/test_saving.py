"""Writing of checkpoint folders: diffusers reads them, and a failure leaves what was there."""

import errno
import os
import shutil

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from cogvx.models import CausalVAE, CheckpointError, ExpertTransformer, saving
from cogvx.models.on_disk import replacing
from cogvx.models.saving import content_hash, new_folder

MODELS = {
    "2b": (ExpertTransformer, CogVideoXTransformer3DModel),
    "5b": (ExpertTransformer, CogVideoXTransformer3DModel),
    "5b-i2v": (ExpertTransformer, CogVideoXTransformer3DModel),
    "1.5-5b": (ExpertTransformer, CogVideoXTransformer3DModel),
    "1.5-5b-i2v": (ExpertTransformer, CogVideoXTransformer3DModel),
    "vae": (CausalVAE, AutoencoderKLCogVideoX),
}


@pytest.mark.parametrize("shard_bytes", [10**10, 20_000])
@pytest.mark.parametrize("name", MODELS)
def test_diffusers_loads_what_we_save(published, tmp_path, name, shard_bytes):
    ours, theirs = MODELS[name]
    model = ours.from_pretrained(published / name)
    model.save_pretrained(tmp_path / "x", shard_bytes)
    loaded, report = theirs.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not any(report.values())
    state = model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    loaded.save_pretrained(tmp_path / "y")
    again = ours.from_pretrained(tmp_path / "y")
    assert again.config == model.config
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    before = theirs.from_pretrained(published / name).config
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {k: v for k, v in before.items() if k[0] != "_"}


def test_shards_keep_to_their_size(published, tmp_path):
    CausalVAE.from_pretrained(published).save_pretrained(tmp_path / "x", 20_000)
    sizes = [path.stat().st_size for path in (tmp_path / "x").glob("*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 20_000 + 8_000  # a header stands before the tensors
    with pytest.raises(ValueError, match="shard_bytes is 0"):
        CausalVAE.from_pretrained(published).save_pretrained(tmp_path / "y", 0)


def test_an_earlier_checkpoint_is_replaced_whole(published, tmp_path):
    vae = CausalVAE.from_pretrained(published)
    vae.save_pretrained(tmp_path / "x", 20_000)
    vae.save_pretrained(tmp_path / "x")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_other_files_are_never_replaced(published, tmp_path):
    vae = CausalVAE.from_pretrained(published)
    vae.save_pretrained(tmp_path / "x")
    (tmp_path / "x" / "notes.md").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes\.md too; give a new or an empty folder"):
        vae.save_pretrained(tmp_path / "x")
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "data.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds data\.json and no checkpoint"):
        vae.save_pretrained(tmp_path / "y")
    with pytest.raises(CheckpointError, match="is a file"):
        vae.save_pretrained(tmp_path / "x" / "notes.md")
    assert (tmp_path / "x" / "notes.md").read_text() == "mine"


@pytest.mark.parametrize("step", ["save_file", "sync", "_replace"])
def test_a_full_disk_leaves_the_earlier_checkpoint(published, tmp_path, monkeypatch, step):
    vae = CausalVAE.from_pretrained(published)
    vae.save_pretrained(tmp_path / "x")
    before = content_hash(tmp_path / "x")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saving, step, full)
    with pytest.raises(CheckpointError, match="x cannot be written: No space left on device"):
        vae.save_pretrained(tmp_path / "x")
    assert content_hash(tmp_path / "x") == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_interruption_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "x") as partial:
        (partial / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_when_all_of_it_is_there(tmp_path):
    file = tmp_path / "a.txt"
    for text in ("old", "new"):
        with replacing(file) as partial:
            partial.write_text(text)
            assert file.exists() == (text == "new") and partial.parent == tmp_path
    with pytest.raises(KeyboardInterrupt), replacing(file) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_a_place_that_cannot_be_written_is_named():
    with pytest.raises(CheckpointError, match="/proc/x cannot be written: "), new_folder("/proc/x"):
        pass


def test_the_hash_follows_content_and_names_alone(published, tmp_path):
    shutil.copytree(published / "vae", tmp_path / "a")
    shutil.copytree(published / "vae", tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("x")
    (tmp_path / "b" / ".cache").mkdir()
    (tmp_path / "b" / ".cache" / "state.json").write_text("{}")
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    file = tmp_path / "b" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    changed = content_hash(tmp_path / "b")
    assert changed != content_hash(tmp_path / "a")
    file.rename(file.with_name("other.safetensors"))
    assert content_hash(tmp_path / "b") not in (changed, content_hash(tmp_path / "a"))
