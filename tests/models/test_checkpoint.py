"""Reading of published folders: what is right loads, what is not says why, and nothing else ever comes out."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from cogvx.models import CausalVAE, CheckpointError, ExpertTransformer
from cogvx.models.checkpoint import EMBEDDED, load_tensors, resolve_folder, save_tensors
from cogvx.models.text import TextEncoder

WEIGHTS, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def folder(published, tmp_path) -> Path:
    """A pipeline's folder to spoil: a transformer in shards, a VAE, a text encoder and a tokenizer."""
    ExpertTransformer.from_pretrained(published / "5b").save_pretrained(tmp_path / "p" / "transformer", 300_000)
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(published / part, tmp_path / "p" / part)
    return tmp_path / "p"


def rewrite(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_shards_hold_what_one_file_holds(published, folder):
    whole, sharded = ExpertTransformer.from_pretrained(published / "5b"), ExpertTransformer.from_pretrained(folder)
    assert len(list((folder / "transformer").glob("*.safetensors"))) >= 3
    assert list(whole.state_dict()) == list(sharded.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True))


def test_dtype_is_kept_or_cast(folder):
    half = load_file(folder / "vae" / WEIGHTS)
    save_file({name: tensor.half() for name, tensor in half.items()}, folder / "vae" / WEIGHTS)
    assert {p.dtype for p in CausalVAE.from_pretrained(folder).parameters()} == {torch.float16}
    cast = CausalVAE.from_pretrained(folder / "vae", dtype=torch.bfloat16)
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in CausalVAE.from_pretrained(folder, device="meta").parameters()} == {"meta"}


def test_weights_outlive_their_file(folder):
    vae = CausalVAE.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    (folder / "vae" / WEIGHTS).write_bytes(b"")
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


def test_missing_extra_and_misshapen_tensors_are_counted_and_named(folder):
    tensors = load_file(folder / "vae" / WEIGHTS)
    for name in ("decoder.conv_in.conv.bias", "decoder.conv_in.conv.weight"):
        del tensors[name]
    tensors["colour"] = torch.zeros(1)
    tensors["encoder.conv_in.conv.bias"] = torch.zeros(5)
    tensors["encoder.conv_out.conv.bias"] = torch.zeros(10, dtype=torch.int32)
    save_file(tensors, folder / "vae" / WEIGHTS)
    with pytest.raises(CheckpointError) as caught:
        CausalVAE.from_pretrained(folder)
    assert str(caught.value) == (
        f"{folder / 'vae'}: 2 missing (decoder.conv_in.conv.bias, decoder.conv_in.conv.weight); 1 too many (colour); "
        "1 of another shape (encoder.conv_in.conv.bias is [5], not [4]); "
        "1 of a type other than F64, F32, F16, BF16 (encoder.conv_out.conv.bias is I32)"
    )


def test_many_faults_take_one_line(published, tmp_path):
    shutil.copytree(published / "2b", tmp_path / "x")
    save_file({f"layer.{i}": torch.zeros(1) for i in range(99)}, tmp_path / "x" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"^[^\n]{1,600}$") as caught:
        ExpertTransformer.from_pretrained(tmp_path / "x")
    assert "99 too many (layer.0, layer.1, layer.10, and 96 more)" in str(caught.value)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_pickle_is_never_read(folder, suffix):
    (folder / "vae" / WEIGHTS).unlink()
    (folder / "vae" / f"diffusion_pytorch_model{suffix}").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(CheckpointError, match="is a pickle, which can run any code when it is read"):
        CausalVAE.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="is a pickle"):
        CausalVAE.from_pretrained(folder / "vae" / f"diffusion_pytorch_model{suffix}")
    rewrite(folder / "transformer" / INDEX, lambda c: c["weight_map"].update(x=f"model{suffix}"))
    with pytest.raises(CheckpointError, match="is a pickle"):
        ExpertTransformer.from_pretrained(folder)


ELSEWHERE = [f"../vae/{WEIGHTS}", f"/{WEIGHTS}", "/etc/passwd", "..", "x.py", "", f"a/{WEIGHTS}", "x" * 5000 + WEIGHTS]


@pytest.mark.parametrize("name", ELSEWHERE, ids=lambda name: name[:40])
def test_a_shard_elsewhere_is_refused(folder, name):
    rewrite(folder / "transformer" / INDEX, lambda c: c["weight_map"].update({"proj_out.bias": name}))
    with pytest.raises(CheckpointError, match=r"names the shard '.*'; a shard is a safetensors file beside it"):
        ExpertTransformer.from_pretrained(folder)


@pytest.mark.parametrize("place", [".", "transformer", "tokenizer"])
@pytest.mark.parametrize(("name", "message"), [
    ("pipeline.py", r"pipeline\.py is code; a model here is data alone, and a folder that brings code is not loaded"),
    ("X.PY", "is code"), ("a.so", "is code"), ("old.pt", r"old\.pt is a pickle"), ("pytorch_model.bin", "is a pickle"),
])  # fmt: skip
def test_code_and_pickles_beside_good_weights_are_refused(folder, place, name, message):
    (folder / place / name).write_text("raise SystemExit")
    for load in (ExpertTransformer.from_pretrained, TextEncoder.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            load(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_variant_alone_is_loaded(folder, sharded):
    transformer, part = ExpertTransformer.from_pretrained(folder), folder / "transformer"
    diffusers = CogVideoXTransformer3DModel.from_pretrained(part)
    shutil.rmtree(part)
    diffusers.save_pretrained(part, variant="fp16", max_shard_size="300KB" if sharded else "1GB")
    assert len(list(part.glob("*.fp16*.safetensors"))) == len(list(part.glob("*.safetensors"))) >= 1 + sharded
    state = ExpertTransformer.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in transformer.state_dict().items())
    shutil.copy(folder / "vae" / WEIGHTS, part / "diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(CheckpointError, match="holds the variants bf16, fp16 and no plain weights; leave one of them"):
        ExpertTransformer.from_pretrained(folder)


@pytest.mark.parametrize("name", [
    f"vae/{WEIGHTS}", "vae/config.json", f"transformer/{INDEX}", "transformer/*-00001-of-*.safetensors", "transformer",
    "text_encoder/model.safetensors", "tokenizer/spiece.model",
])  # fmt: skip
def test_a_link_out_of_the_folder_is_refused(folder, tmp_path, name):
    [path] = folder.glob(name)
    (tmp_path / "elsewhere").mkdir()
    path.rename(tmp_path / "elsewhere" / path.name)
    path.symlink_to(tmp_path / "elsewhere" / path.name)
    with pytest.raises(CheckpointError, match="is a link that leaves its folder"):
        LOADERS[name.split("/")[0]](folder)


def test_a_link_to_itself_and_a_pipe_are_refused(folder):
    config = folder / "vae" / "config.json"
    config.unlink()
    config.symlink_to(config)
    with pytest.raises(CheckpointError, match=r"config\.json is a link that leads nowhere"):
        CausalVAE.from_pretrained(folder)
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        CausalVAE.from_pretrained(folder)


def test_a_name_cannot_write_to_the_terminal(folder):
    save_file({"\x1b[2J\nowned": torch.zeros(1)}, folder / "vae" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"1 too many \(\?\[2J\?owned\)$"):
        CausalVAE.from_pretrained(folder)


def test_links_within_a_hub_cache_are_followed(published, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123" / "vae"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, name in enumerate(("config.json", WEIGHTS)):
        shutil.copy(published / "vae" / name, blobs / str(i))
        (snapshot / name).symlink_to(Path("../../../blobs") / str(i))
    assert CausalVAE.from_pretrained(snapshot.parent).config == CausalVAE.from_pretrained(published).config
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(published / "vae" / WEIGHTS)
    with pytest.raises(CheckpointError, match="is a link that leaves its folder"):
        CausalVAE.from_pretrained(snapshot.parent)


def test_a_folder_that_is_no_checkpoint_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    for name, message in (
        (tmp_path, "is no checkpoint: it holds neither vae/config.json nor config.json"),
        (
            tmp_path / "absent" / "folder",
            "is no folder; give a checkpoint folder, a hub name like owner/name, tiny or tiny-i2v",
        ),
        (tmp_path / "notes.txt", "is a file; a checkpoint is a folder"),
        ("nobody/nothing-of-this-name", "is no folder here and could not be had from the hub"),
        ("../x", "is no folder"),
        ("", "'' is no folder"),
        ("x" * 5000, "is no folder"),
        ("a\0b", "is no folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            CausalVAE.from_pretrained(name)
    (folder / "vae" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: diffusion_pytorch_model\.safetensors is missing"):
        CausalVAE.from_pretrained(folder)


def test_tiny_is_inside_the_package():
    assert resolve_folder("tiny").parts[-3:] == ("cogvx", "assets", "tiny")


def test_an_embedded_checkpoint_that_a_build_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(EMBEDDED, "tiny-i2v", tmp_path / "gone")
    with pytest.raises(CheckpointError, match="tiny-i2v is not inside this build; `make tiny` trains it"):
        resolve_folder("tiny-i2v")


def test_a_dtype_or_device_that_is_none_is_named(folder):
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; it must be None or one of torch\.float64, "):
        CausalVAE.from_pretrained(folder, dtype=torch.int8)
    with pytest.raises(ValueError, match="device is 'gpu'; it must be a device of torch, such as cpu or cuda"):
        CausalVAE.from_pretrained(folder, device="gpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is no valid JSON"),
        (b"\xff\xfe", "is no valid JSON"),
        (b"[" * 100_000, "is no valid JSON"),
        (b'{"num_layers": ' + b"9" * 5000 + b"}", "is no valid JSON"),
        (b"[]", "holds a list, not an object with fields"),
        (b" " * (2**24 + 1), "has 16777217 bytes; at most 16777216 are read"),
        (b'{"num_layers": 0}', "config.json: num_layers is 0; it must be between 1 and"),
        (b"{}", "missing"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_damaged_config_says_so(folder, content, message):
    (folder / "transformer" / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        ExpertTransformer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {"x": 1}}, "has a weight_map whose values are not all file names"),
        ({"weight_map": {"x": "absent.safetensors"}}, "names the shard absent.safetensors, which is missing"),
    ],
)
def test_a_damaged_index_says_so(folder, content, message):
    (folder / "transformer" / INDEX).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        ExpertTransformer.from_pretrained(folder)


def test_single_files_of_tensors(tmp_path):
    tensors = {"latents": torch.randn(1, 2, 3).transpose(1, 2)}
    save_tensors(tensors, tmp_path / "x.safetensors", {"fps": "8"})
    loaded, words = load_tensors(tmp_path / "x.safetensors")
    assert torch.equal(loaded["latents"], tensors["latents"]) and words == {"fps": "8"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    (tmp_path / "x.safetensors").write_bytes(b"no")
    for name, message in (("x.safetensors", "is no intact safetensors"), ("y", "does not exist"), ("z.pt", "a pickle")):
        with pytest.raises(CheckpointError, match=message):
            load_tensors(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_tensors(tensors, tmp_path / "absent" / "x.safetensors")


LOADERS = {
    "transformer": ExpertTransformer.from_pretrained,
    "vae": CausalVAE.from_pretrained,
    "text_encoder": TextEncoder.from_pretrained,
    "tokenizer": TextEncoder.from_pretrained,
}


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.soak)])
def test_a_spoiled_folder_loads_or_raises_our_error(folder, spoiled, count):
    rng = random.Random(count)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    refused = 0
    for case in range(count):
        file = rng.choice(files)
        content = file.read_bytes()
        file.write_bytes(spoiled(content, file.suffix, rng))
        if file.name == "spiece.model":
            (file.parent / "tokenizer.json").rename(file.parent / "aside")
        elif file.name == "tokenizer.json":
            (file.parent / "spiece.model").rename(file.parent / "aside")
        start = time.process_time()
        try:
            loaded = LOADERS[file.parent.name](folder)
            if isinstance(loaded, TextEncoder):
                loaded.tokenize(["a red circle moves left", "Æ, <pad> !"])
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
        except BaseException as error:
            raise AssertionError(f"case {case}: {file} spoiled gives {type(error).__name__}: {error}") from error
        assert time.process_time() - start < 2.0, f"case {case}: {file} spoiled takes too long"
        other = {"spiece.model": "tokenizer.json", "tokenizer.json": "spiece.model"}.get(file.name)
        if other:
            (file.parent / "aside").rename(file.parent / other)
        file.write_bytes(content)
    assert refused > count // 4
    assert not os.path.exists("owned")
