"""Conversion between formats: every byte of every tensor comes back, and what has no place is listed."""

import os
import pickle

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from safetensors.torch import load_file

from cogvx.models import CausalVAE, CheckpointError, ExpertTransformer

KINDS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")


@pytest.fixture
def sat_file(published, tmp_path, as_sat):
    """`sat_file("5b")`: a small transformer, or the VAE, in bf16 as the official code stores it, tables included."""

    def make(kind):
        part, folder = "vae" if kind == "vae" else "transformer", published / kind
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        tensors = {name: tensor.bfloat16() for name, tensor in as_sat(part, weights).items()}
        if part == "vae":
            content = {"epoch": 1, "state_dict": tensors | {"loss.logvar": torch.zeros(()), "loss.d.w": torch.zeros(2)}}
        else:
            pos, word = "mixins.pos_embed.", "transformer.word_embeddings.weight"
            tables = {pos + "pos_embedding": torch.rand(1, 8, 96)} if kind == "2b" else {
                pos + name: torch.rand(8, 32) for name in ("freqs_sin", "freqs_cos")}  # fmt: skip
            tables |= {f"transformer.{name}_embeddings.weight": torch.rand(3, 96) for name in ("word", "position")}
            content = {"module": {f"model.diffusion_model.{n}": t for n, t in (tensors | tables).items()},
                       "iteration": 1000, "args": {"mode": "pretrain", word: None}}  # fmt: skip
        (tmp_path / f"sat-{kind}").mkdir()
        torch.save(content, tmp_path / f"sat-{kind}" / "mp_rank_00_model_states.pt")
        return tmp_path / f"sat-{kind}" / "mp_rank_00_model_states.pt"

    return make


def tensors_of(file):
    content = torch.load(file, weights_only=True)
    return content.get("module") or content["state_dict"]


def bits(tensor):
    return tensor.contiguous().view(torch.int16)


@pytest.mark.parametrize("kind", [*KINDS, "vae"])
def test_sat_to_diffusers_to_sat_changes_no_byte(published, sat_file, tmp_path, run_command, kind):
    first = sat_file(kind)
    status, out, err = run_command(
        "convert", first, tmp_path / "d", "--to", "diffusers", "--config", published / kind
    )  # fmt: skip
    assert status == 0 and err == "", err
    before, left_out = tensors_of(first), {line[10:].strip() for line in out.splitlines()[1:]}
    assert left_out == {name for name in before if "pos_embed.freqs" in name or name.startswith("loss.")
                        or "_embeddings." in name
                        or (kind == "2b" and "pos_embedding" in name)}  # fmt: skip
    theirs = AutoencoderKLCogVideoX if kind == "vae" else CogVideoXTransformer3DModel
    loaded, report = theirs.from_pretrained(tmp_path / "d", output_loading_info=True, torch_dtype=torch.bfloat16)
    assert not any(report.values())
    loaded.bfloat16().save_pretrained(tmp_path / "e")  # diffusers in between; it loads a learned table in fp32
    assert run_command("convert", tmp_path / "e", tmp_path / "again.pt", "--to", "sat")[0] == 0
    after = tensors_of(tmp_path / "again.pt")
    assert after.keys() == before.keys() - left_out
    assert all(torch.equal(bits(after[name]), bits(before[name])) for name in after)


@pytest.mark.parametrize("kind", ["2b", "1.5-5b-i2v", "vae"])
def test_a_sat_file_and_the_diffusers_folder_compute_the_same(published, sat_file, tmp_path, run_command, kind):
    assert run_command("convert", sat_file(kind), tmp_path / "x.safetensors", "--to", "single", "--config",
                       published / kind, "--dtype", "float32")[0] == 0  # fmt: skip
    ours = CausalVAE if kind == "vae" else ExpertTransformer
    expected = ours.from_pretrained(published / kind, dtype=torch.bfloat16).state_dict()
    state = ours.from_pretrained(tmp_path / "x.safetensors").state_dict()
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert all(torch.equal(state[name], expected[name].float()) for name in expected)


def test_one_part_of_a_pipelines_folder(small_checkpoint, tmp_path, run_command):
    folder = small_checkpoint("5b")
    status, _, err = run_command("convert", folder, tmp_path / "x.pt", "--to", "sat")
    assert status == 2 and "holds transformer and vae; say --component transformer or vae" in err
    status, out, _ = run_command("convert", folder, tmp_path / "x.pt", "--to", "sat", "--component", "vae")
    assert status == 0
    assert [line.split()[-1] for line in out.splitlines()[1:]] == [
        "scheduler/", "text_encoder/", "tokenizer/", "transformer/"]  # fmt: skip
    words = ("convert", tmp_path / "x.pt", tmp_path / "y", "--to", "diffusers", "--config", folder)
    assert run_command(*words)[0] == 0
    before, after = CausalVAE.from_pretrained(folder), CausalVAE.from_pretrained(tmp_path / "y")
    assert before.config == after.config
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_what_convert_refuses(published, sat_file, tmp_path, run_command):
    (tmp_path / "there").mkdir()
    transformer, vae = sat_file("5b"), sat_file("vae")
    for words, message in (
        ((published / "5b", tmp_path / "x.bin", "--to", "sat"), "for sat its name must end in .pt"),
        ((published / "5b", tmp_path / "there", "--to", "diffusers"), "there exists; give a new name"),
        ((published / "5b", tmp_path / "no" / "x.pt", "--to", "sat"), "there is no folder"),
        ((published / "5b", tmp_path / "x.pt", "--to", "sat", "--config", "5b"), "a folder has its own"),
        ((published / "text_encoder", tmp_path / "x.pt", "--to", "sat"), "converted are transformers and VAEs"),
        ((tmp_path / "gone.pt", tmp_path / "x", "--to", "diffusers"), "gone.pt does not exist; give a SAT file"),
        ((transformer, tmp_path / "x", "--to", "diffusers"), "is no released transformer (2 layers, width 96"),
        ((transformer, tmp_path / "x", "--to", "diffusers", "--config", "9b"), "config is '9b'; it must be one of"),
        ((vae, tmp_path / "x", "--to", "diffusers"), "does not say which model's VAE it is"),
    ):
        status, out, err = run_command("convert", *words)
        assert status == 2 and message in err and out == "" and err.count("\n") == 1, err
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.pt").exists()


class Bomb:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("save", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))])
def test_a_pickle_that_would_run_code_is_not_read(save, published, tmp_path, run_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save({"module": {"x": torch.zeros(1), "y": Bomb()}}, tmp_path / "b.pt")
    status, _, err = run_command("convert", "b.pt", "x", "--to", "diffusers", "--config", published / "5b")
    assert status == 2 and ("holds more than tensors, which could run any code" in err or "no intact file" in err)
    assert [path.name for path in tmp_path.iterdir()] == ["b.pt"]


@pytest.mark.parametrize("content", [{"module": {}}, [1], {"module": {"x": 3}}, {"x": "y"}])
def test_a_file_without_tensors_says_so(content, tmp_path, run_command):
    torch.save(content, tmp_path / "b.pt")
    status, _, err = run_command("convert", tmp_path / "b.pt", tmp_path / "x", "--to", "diffusers")
    assert status == 2 and ("holds no named tensors" in err or "not named tensors" in err)


def test_tensors_that_are_none_of_ours_are_refused(sat_file, published, tmp_path, run_command):
    file = sat_file("5b")
    content = torch.load(file, weights_only=True)
    prefix = "model.diffusion_model.transformer.layers.0."
    content["module"][prefix + "mlp.dense_4h_to_h.bias"] = torch.zeros(96).to_sparse()
    content["module"][prefix + "attention.dense.bias"] = torch.zeros(96, dtype=torch.int32)
    content["module"][prefix + "input_layernorm.bias"] = torch.zeros(96, device="meta")
    torch.save(content, file)
    status, _, err = run_command("convert", file, tmp_path / "x", "--to", "diffusers", "--config", published / "5b")
    assert status == 2 and "3 of a type other than F64, F32, F16, BF16" in err, err


def test_the_loader_names_the_converter(sat_file):
    with pytest.raises(
        CheckpointError, match=r"is a pickle, .*: cogvx convert mp_rank_00_model_states\.pt OUTPUT --to"
    ):
        ExpertTransformer.from_pretrained(sat_file("5b"))
