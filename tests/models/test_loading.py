"""One file instead of a folder: every usual prefix, diffusers' names and SAT's, and what is said of others."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogvx.config import PRESETS, TransformerConfig, VAEConfig
from cogvx.models import CausalVAE, CheckpointError, ExpertTransformer
from cogvx.models.loading import pick_config, save_single
from cogvx.models.names import find, sat_place, to_sat
from cogvx.models.stored import Stored

KINDS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")
PREFIXES = {"transformer": ["", "transformer.", "model.diffusion_model.", "diffusion_model."],
            "vae": ["", "vae.", "first_stage_model."]}  # fmt: skip
CLASSES = {"transformer": ExpertTransformer, "vae": CausalVAE}


def weights_of(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def equal(model, folder):
    expected = weights_of(folder)
    state = model.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("sat", [False, True], ids=["diffusers", "sat"])
@pytest.mark.parametrize(("name", "prefix"), [(kind, p) for kind in KINDS for p in PREFIXES["transformer"]]
                         + [("vae", p) for p in PREFIXES["vae"]])  # fmt: skip
def test_a_single_file_loads_under_every_prefix(published, tmp_path, as_sat, name, prefix, sat):
    folder, part = published / name, "vae" if name == "vae" else "transformer"
    weights = as_sat(part, weights_of(folder)) if sat else weights_of(folder)
    save_file({prefix + key: tensor.contiguous() for key, tensor in weights.items()}, tmp_path / "x.safetensors")
    model = CLASSES[part].from_pretrained(tmp_path / "x.safetensors", config=folder)
    assert equal(model, folder) and model.config == CLASSES[part].from_pretrained(folder).config


def test_one_file_may_hold_both_and_more(published, tmp_path):
    whole = {f"model.diffusion_model.{n}": t for n, t in weights_of(published / "5b").items()}
    whole |= {f"first_stage_model.{n}": t for n, t in weights_of(published / "vae").items()}
    save_file(whole | {"cond_stage_model.x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert equal(
        ExpertTransformer.from_pretrained(tmp_path / "x.safetensors", config=published / "5b"), published / "5b"
    )
    assert equal(CausalVAE.from_pretrained(tmp_path / "x.safetensors", config=published / "vae"), published / "vae")


@pytest.mark.parametrize(("part", "kind"), [("transformer", kind) for kind in KINDS] + [("vae", "vae")])
def test_what_we_write_says_its_config(published, tmp_path, part, kind):
    model = CLASSES[part].from_pretrained(published / kind)
    save_single(model, tmp_path / "x.safetensors")
    again = CLASSES[part].from_pretrained(tmp_path / "x.safetensors")
    assert equal(again, published / kind) and again.config == model.config
    assert torch.equal(load_file(tmp_path / "x.safetensors")[name := next(iter(model.state_dict()))],
                       model.state_dict()[name])  # fmt: skip
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sat", [False, True])
def test_released_transformers_are_known_by_their_sizes(kind, sat):
    config = PRESETS[kind].transformer
    with torch.device("meta"):
        names = ExpertTransformer(config).state_dict()
    if sat:
        names = to_sat("transformer", names)
    stored = [(name, Stored(list(tensor.shape), "BF16", lambda: None)) for name, tensor in names.items()]
    found = find(names, None, "x")
    assert found.component == "transformer" and found.sat == sat
    assert pick_config("transformer", None, {}, stored, found, "x") == config


def test_a_file_that_says_too_little_is_refused(published, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(weights_of(published / "vae"), file)
    with pytest.raises(
        CheckpointError, match="does not say which model's VAE it is; give config, one of 2b, 5b, 5b-i2v"
    ):
        CausalVAE.from_pretrained(file)
    with pytest.raises(CheckpointError, match=r"holds no transformer of CogVideoX: none of its \d+ names is known"):
        ExpertTransformer.from_pretrained(file)
    save_file(weights_of(published / "5b"), file)
    size = "2 layers, width 96, 16 channels in, patches of one frame"
    with pytest.raises(CheckpointError, match=rf"is no released transformer \({size}\) and states no config; give one"):
        ExpertTransformer.from_pretrained(file)
    with pytest.raises(CheckpointError, match=r"missing .*; 63 of another shape"):
        ExpertTransformer.from_pretrained(file, config="2b")
    for config, message in (
        (VAEConfig(), "config is a VAEConfig; it must be a TransformerConfig"),
        ("3b", "config is '3b'; it must be one of 2b, 5b, .*, or a checkpoint's folder"),
    ):
        with pytest.raises(ValueError, match=message):
            ExpertTransformer.from_pretrained(file, config=config)
    with pytest.raises(CheckpointError, match="is no single file; a folder has its own"):
        ExpertTransformer.from_pretrained(published / "5b", config="5b")
    with pytest.raises(CheckpointError, match=r"gone\.gguf does not exist; give a safetensors or GGUF file"):
        ExpertTransformer.from_pretrained(tmp_path / "gone.gguf")


def test_two_of_one_kind_in_a_file_are_refused(published, tmp_path):
    weights = weights_of(published / "5b")
    save_file(weights | {f"transformer.{n}": t.clone() for n, t in weights.items()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="holds transformer as no prefix and transformer as transformer"):
        ExpertTransformer.from_pretrained(tmp_path / "x.safetensors", config=published / "5b")


@pytest.mark.parametrize("config", ["{", "[]", '{"num_layers": 0}', "[" * 9999, '{"num_layers": ' + "9" * 5000 + "}"])
def test_a_damaged_config_in_the_header_says_so(published, tmp_path, config):
    save_file(weights_of(published / "5b"), tmp_path / "x.safetensors", {"config": config})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: the config in its header: "):
        ExpertTransformer.from_pretrained(tmp_path / "x.safetensors")


def test_tensors_missing_misshapen_or_strange_are_named_in_sat_files_too(published, tmp_path, as_sat):
    weights = as_sat("transformer", weights_of(published / "5b"))
    del weights["time_embed.0.bias"]
    weights["transformer.layers.1.attention.query_key_value.bias"] = torch.zeros(97)
    weights["mixins.colour"] = torch.zeros(1)
    save_file({n: t.contiguous() for n, t in weights.items()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as caught:
        ExpertTransformer.from_pretrained(tmp_path / "x.safetensors", config=published / "5b")
    assert "1 missing (time_embedding.linear_1.bias); 1 too many (mixins.colour); 3 of another shape" in str(
        caught.value
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_has_one_place_in_sat(kind):
    preset = PRESETS[kind]
    for part, model_class, config in (
        ("transformer", ExpertTransformer, preset.transformer), ("vae", CausalVAE, preset.vae)
    ):  # fmt: skip
        with torch.device("meta"):
            names = list(model_class(config).state_dict())
        pieces = [(place.name, i) for place in (sat_place(part, name) for name in names) for i in place.taken]
        assert len(pieces) == len(set(pieces))
        assert all(not name.startswith(("transformer_blocks", "patch_embed", "norm_out")) for name, _ in pieces)


def test_a_config_of_ours_may_be_given(published, tmp_path):
    save_file(weights_of(published / "5b"), tmp_path / "x.safetensors")
    content = json.loads((published / "5b" / "config.json").read_text())
    config = replace(TransformerConfig.from_dict(content), sample_frames=17)
    assert ExpertTransformer.from_pretrained(tmp_path / "x.safetensors", config=config).config.sample_frames == 17
