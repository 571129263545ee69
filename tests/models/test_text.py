"""The text encoder against the one that diffusers' pipeline runs."""

import json
import logging
import shutil

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel, T5Tokenizer

from cogvx.models import CheckpointError
from cogvx.models.linear import WideLinear
from cogvx.models.text import TextEncoder

PROMPTS = ["a red circle moves left", "", "Spelled, LETTER by letter: more than sixteen pieces"]


@pytest.fixture(scope="module")
def oracle(published):
    tokenizer = T5Tokenizer.from_pretrained(published / "tokenizer")
    text_encoder = T5EncoderModel.from_pretrained(published / "text_encoder")
    return CogVideoXPipeline(tokenizer, text_encoder, None, None, None)


def theirs(pipeline, prompts):
    return pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=16, device="cpu")


def test_embeds_what_diffusers_embeds(published, oracle, relative_error):
    encoder = TextEncoder.from_pretrained(published, max_length=16)
    ours = encoder.encode(PROMPTS)
    assert ours.shape == (3, 16, 20)
    assert relative_error(ours, theirs(oracle, PROMPTS)) <= 1e-6


def test_a_long_prompt_is_cut_with_a_warning(published, caplog):
    encoder = TextEncoder.from_pretrained(published, max_length=6)
    with caplog.at_level(logging.WARNING):
        ids = encoder.tokenize(["a red circle moves left", "red red red red red moves left"])
    assert "longer than 6 tokens; this was cut: 'moves left'" in caplog.text and len(caplog.records) == 1
    assert ids.shape == (2, 6) and ids[:, -1].tolist() == [1, 1]


def test_saved_folders_load_here_and_in_transformers(published, oracle, tmp_path, relative_error):
    TextEncoder.from_pretrained(published, max_length=16).save_pretrained(tmp_path)
    again = TextEncoder.from_pretrained(tmp_path, max_length=16)
    assert torch.equal(again.encode(PROMPTS), TextEncoder.from_pretrained(published, max_length=16).encode(PROMPTS))
    tokenizer = T5Tokenizer.from_pretrained(tmp_path / "tokenizer")
    text_encoder, report = T5EncoderModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not any(report.values())
    pipeline = CogVideoXPipeline(tokenizer, text_encoder, None, None, None)
    assert torch.equal(theirs(pipeline, PROMPTS), theirs(oracle, PROMPTS))


def test_the_embedding_may_stand_under_either_name_or_both(published, tmp_path):
    shutil.copytree(published, tmp_path / "x")
    file = tmp_path / "x" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    want = TextEncoder.from_pretrained(published).encode(["a"])
    for names in (["encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight", "shared.weight"]):
        others = {name: tensor for name, tensor in tensors.items() if name != "shared.weight"}
        save_file(others | {name: tensors["shared.weight"].clone() for name in names}, file)
        encoder = TextEncoder.from_pretrained(tmp_path / "x")
        assert torch.equal(encoder.encode(["a"]), want)
        assert encoder.model.encoder.embed_tokens.weight is encoder.model.shared.weight


def test_fp16_keeps_the_layers_that_overflow_in_fp32(published):
    model = TextEncoder.from_pretrained(published, dtype=torch.float16).model
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    oracle = T5EncoderModel.from_pretrained(published / "text_encoder", dtype=torch.float16)
    assert kinds == {name: p.dtype for name, p in oracle.named_parameters()}


def test_those_layers_stay_in_fp16_where_they_are_stored_so(published, tmp_path):
    """They are computed in fp32 all the same."""
    shutil.copytree(published, tmp_path / "x")
    file = tmp_path / "x" / "text_encoder" / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    encoder = TextEncoder.from_pretrained(tmp_path / "x", dtype=torch.float16)
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float16}
    found = encoder.encode(PROMPTS)
    for module in encoder.model.modules():
        if isinstance(module, WideLinear):
            module.float()
    assert torch.equal(encoder.encode(PROMPTS), found)


@pytest.mark.parametrize("part", ["spiece.model", "tokenizer.json"])
def test_either_vocabulary_file_is_enough(published, tmp_path, part):
    shutil.copytree(published, tmp_path / "x")
    (tmp_path / "x" / "tokenizer" / part).unlink()
    ids = TextEncoder.from_pretrained(tmp_path / "x").tokenize(PROMPTS)
    assert torch.equal(ids, TextEncoder.from_pretrained(published).tokenize(PROMPTS))


def test_faults_are_named(published, tmp_path):
    shutil.copytree(published, tmp_path / "x")
    root = tmp_path / "x"
    tokenizer, config = root / "tokenizer", root / "text_encoder" / "config.json"

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            TextEncoder.from_pretrained(root)

    content = json.loads(config.read_text())
    for change, message in (
        ({"model_type": "bert"}, "model_type is 'bert', not 't5'"),
        ({"num_layers": 10**9}, "num_layers is 1000000000; it must be a whole number from 1 to 256"),
        ({"d_ff": "x"}, "d_ff is x; it must be a whole number"),
        ({"feed_forward_proj": "sideways"}, "feed_forward_proj is 'sideways', not 'relu' or 'gated-gelu'"),
        ({"vocab_size": 50}, "the tokenizer has 103 pieces, the text encoder 50"),
        ({"d_ff": 25}, "of another shape"),
    ):
        config.write_text(json.dumps(content | change))
        refused(message)
    config.write_text(json.dumps(content))
    (tokenizer / "spiece.model").write_bytes(b"\x0a\x03abc")
    refused("spiece.model is no intact vocabulary: ")
    (tokenizer / "spiece.model").unlink()
    (tokenizer / "tokenizer.json").unlink()
    refused("holds no vocabulary: spiece.model is missing")
    shutil.rmtree(tokenizer)
    refused("is no checkpoint: it holds neither tokenizer/config.json nor config.json")
