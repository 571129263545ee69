"""Weights in fewer bits: GGUF as the gguf package reads it, bit for bit, and fp8 with and without scales."""

import random
import struct
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvx.config import TransformerConfig
from cogvx.models import CausalVAE, CheckpointError, ExpertTransformer
from cogvx.models.quantized import opened_gguf

gguf = pytest.importorskip("gguf")
KINDS = gguf.GGMLQuantizationType
CONFIG = TransformerConfig(
    num_attention_heads=8, attention_head_dim=32, num_layers=1, time_embed_dim=256, text_embed_dim=256,
    max_text_seq_length=7, sample_width=12, sample_height=8, sample_frames=9, use_rotary_positional_embeddings=True,
)  # fmt: skip
# Where a block of the kinds that the package cannot make keeps its scales, in fp16; random bits there would give
# infinities. IQ1_M spreads its scale over the block.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ1_M": ()}
SCALES |= dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ4_NL", "IQ4_XS"), (0,))


@pytest.fixture(scope="module")
def weights(randomized):
    return {name: t.detach() for name, t in randomized(ExpertTransformer(CONFIG), 3).state_dict().items()}


def quantized(values, kind):
    """The bytes of a matrix in a GGUF kind; where the package cannot quantise, random blocks of that kind."""
    if kind.name not in SCALES:
        return gguf.quantize(values, kind)
    size, length = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(values.shape[0])
    blocks = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // size, length), dtype=np.uint8)
    for at in SCALES[kind.name]:
        blocks[..., at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def write(file, weights, kind, prefix="", rows_of_256=()):
    """A GGUF file as the converters for diffusion models write it: matrices in `kind`, the rest in fp32."""
    writer, expected = gguf.GGUFWriter(file, "cogvideox"), {}
    for name, tensor in weights.items():
        values = tensor.numpy()
        if name in rows_of_256:
            writer.add_array(f"comfy.gguf.orig_shape.{prefix}{name}", list(values.shape))
            values = values.reshape(-1, 256)
        if values.ndim == 2:
            data = quantized(values, kind)
            writer.add_tensor(prefix + name, data, raw_dtype=kind)
            expected[name] = torch.from_numpy(gguf.dequantize(data, kind)).reshape(tensor.shape)
        else:
            writer.add_tensor(prefix + name, values)
            expected[name] = tensor
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "TQ1_0", "TQ2_0", "MXFP4", *SCALES])
def test_gguf_is_dequantised_bit_for_bit(weights, tmp_path, kind):
    expected = write(tmp_path / "x.gguf", weights, KINDS[kind], "model.diffusion_model.")
    model = ExpertTransformer.from_pretrained(tmp_path / "x.gguf", config=CONFIG, dtype=torch.float32)
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name].view(torch.int32), expected[name].view(torch.int32)) for name in expected)
    assert {p.dtype for p in ExpertTransformer.from_pretrained(tmp_path / "x.gguf", config=CONFIG).parameters()} == {
        torch.bfloat16
    }


def test_a_block_of_q8_0_worked_by_hand(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "x")
    block = np.concatenate(
        [np.array([0.5], np.float16).view(np.uint8), np.arange(-16, 16, dtype=np.int8).view(np.uint8)]
    )
    writer.add_tensor("x", block[None], raw_dtype=KINDS.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    [(name, tensor)] = opened_gguf(tmp_path / "x.gguf")
    assert name == "x" and tensor.shape == [1, 32]
    assert torch.equal(tensor.read(), torch.arange(-16, 16)[None] * 0.5)


def test_tensors_stored_in_rows_of_256_get_their_shape_back(weights, tmp_path):
    name = "patch_embed.proj.weight"
    expected = write(tmp_path / "x.gguf", weights, KINDS.Q4_K, rows_of_256={name})
    state = ExpertTransformer.from_pretrained(tmp_path / "x.gguf", config=CONFIG, dtype=torch.float32).state_dict()
    assert state[name].shape == weights[name].shape and torch.equal(state[name], expected[name])


def test_convert_reads_gguf(weights, tmp_path, run_command, published):
    expected = write(tmp_path / "x.gguf", weights, KINDS.Q8_0)
    ExpertTransformer(CONFIG).save_pretrained(tmp_path / "like")
    words = ("convert", tmp_path / "x.gguf", tmp_path / "d", "--to", "diffusers", "--config", tmp_path / "like")
    status, _, err = run_command(*words)
    assert status == 0, err
    state = ExpertTransformer.from_pretrained(tmp_path / "d").state_dict()
    assert all(torch.equal(state[name], expected[name].bfloat16()) for name in expected)


def test_a_damaged_gguf_file_gives_our_error(weights, tmp_path):
    file = tmp_path / "x.gguf"
    write(file, weights, KINDS.Q8_0)
    whole, rng = file.read_bytes(), random.Random(0)
    refused = 0
    for case in range(60):
        content = bytearray(whole[: rng.choice((0, 3, 30, 3000, len(whole) - 10))] if case % 3 == 0 else whole)
        for _ in range(rng.choice((1, 4)) if case % 3 else 0):
            content[rng.randrange(4000)] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        start = time.process_time()
        try:
            ExpertTransformer.from_pretrained(file, config=CONFIG)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
        assert time.process_time() - start < 2.0, case
    assert refused > 30


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("what", ["fields", "tensors", "items", "strings"])
def test_a_gguf_header_that_counts_too_much_costs_nothing(tmp_path, order, what):
    counts = {"tensors": 0, "fields": 1, "items": 0, "strings": 0} | {what: 2**24}
    array = struct.pack(order + "IIQ", 9, 8, counts["strings"]) if what == "strings" else struct.pack(
        order + "IIQ", 9, 0, counts["items"])  # fmt: skip
    head = struct.pack(order + "4sIQQ", b"GGUF", 3, counts["tensors"], counts["fields"])
    (tmp_path / "x.gguf").write_bytes(head + struct.pack(order + "Q1s", 1, b"x") + array + bytes(2**24))
    start = time.process_time()
    with pytest.raises(CheckpointError, match="its header counts more than 65536 items"):
        ExpertTransformer.from_pretrained(tmp_path / "x.gguf", config=CONFIG)
    assert time.process_time() - start < 0.5


def test_without_the_package_gguf_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"x\.gguf is no intact GGUF file"):
        ExpertTransformer.from_pretrained(tmp_path / "x.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match="the package gguf reads those: pip install gguf"):
        ExpertTransformer.from_pretrained(tmp_path / "x.gguf")


def as_fp8(weights, scale_name=None, rows=False, kind=torch.float8_e4m3fn):
    """Matrices in fp8 beside everything else in bf16, and what they stand for in fp32."""
    stored, meant = {}, {}
    for name, tensor in weights.items():
        stored[name] = meant[name] = tensor.bfloat16()
        if tensor.dim() == 2:
            size = tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().max()
            scale = size / torch.finfo(kind).max if scale_name else torch.tensor(1.0)
            stored[name] = (tensor / scale).to(kind)
            meant[name] = stored[name].float() * scale
            if scale_name:
                stored[name.removesuffix("weight") + scale_name] = scale if rows else scale.reshape(())
        meant[name] = meant[name].float()
    return stored, meant


@pytest.mark.parametrize(("scale_name", "rows"), [
    (None, False), ("scale_weight", False), ("weight_scale", False), ("weight_scale", True),
])  # fmt: skip
@pytest.mark.parametrize(("prefix", "kind"), [("", torch.float8_e4m3fn), ("model.diffusion_model.", torch.float8_e5m2)])
def test_fp8_with_and_without_scales(published, tmp_path, scale_name, rows, prefix, kind):
    original = load_file(published / "5b" / "diffusion_pytorch_model.safetensors")
    stored, meant = as_fp8(original, scale_name, rows, kind)
    if scale_name == "scale_weight":
        stored["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
        stored["proj_out.scale_input"] = torch.ones(())
    save_file({prefix + n: t.contiguous() for n, t in stored.items()}, tmp_path / "x.safetensors")
    state = ExpertTransformer.from_pretrained(
        tmp_path / "x.safetensors", config=published / "5b", dtype=torch.float32
    ).state_dict()
    assert state.keys() == meant.keys() and all(torch.equal(state[name], meant[name]) for name in meant)
    half = ExpertTransformer.from_pretrained(tmp_path / "x.safetensors", config=published / "5b").state_dict()
    assert all(torch.equal(half[name], meant[name].bfloat16()) for name in meant)


def test_fp8_in_a_folder(published, tmp_path):
    vae = load_file(published / "vae" / "diffusion_pytorch_model.safetensors")
    CausalVAE.from_pretrained(published).save_pretrained(tmp_path / "vae")
    fp8 = {n: t.to(torch.float8_e4m3fn) if t.dim() > 1 else t for n, t in vae.items()}
    save_file(fp8, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    state = CausalVAE.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(state[name], fp8[name].bfloat16()) for name in fp8)


def test_a_scale_that_does_not_fit_is_refused(published, tmp_path):
    stored, _ = as_fp8(load_file(published / "5b" / "diffusion_pytorch_model.safetensors"), "scale_weight")
    stored["proj_out.scale_weight"] = torch.ones(3)
    save_file({n: t.contiguous() for n, t in stored.items()}, tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match=r"1 of a type other than .* \(proj_out\.weight is F8_E4M3 with a scale of F32"
    ):
        ExpertTransformer.from_pretrained(tmp_path / "x.safetensors", config=published / "5b")
