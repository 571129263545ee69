"""Small random checkpoints that the diffusers library wrote, every parameter drawn, norms and modulation included."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from cogvx.config import TransformerConfig, VAEConfig
from cogvx.train.tokenizer import build_tokenizer

LIKE_2B = TransformerConfig(
    num_attention_heads=3, attention_head_dim=32, num_layers=2, time_embed_dim=24, text_embed_dim=20,
    max_text_seq_length=7, sample_width=12, sample_height=8, sample_frames=9,
)  # fmt: skip
LIKE_5B = replace(LIKE_2B, use_rotary_positional_embeddings=True)
LIKE_5B_I2V = replace(LIKE_5B, in_channels=32, use_learned_positional_embeddings=True)
LIKE_1_5 = replace(LIKE_5B, patch_size_t=2, patch_bias=False, sample_frames=17)
LIKE_1_5_I2V = replace(LIKE_1_5, in_channels=32, ofs_embed_dim=24)
KINDS = {"2b": LIKE_2B, "5b": LIKE_5B, "5b-i2v": LIKE_5B_I2V, "1.5-5b": LIKE_1_5, "1.5-5b-i2v": LIKE_1_5_I2V}
SMALL_VAE = VAEConfig(block_out_channels=(4, 8, 8, 12), layers_per_block=1, norm_num_groups=2, latent_channels=5)


@torch.no_grad()
def _randomized(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def randomized():
    return _randomized


@pytest.fixture(scope="session")
def relative_error():
    def measure(ours: Tensor, theirs: Tensor) -> float:
        assert ours.shape == theirs.shape
        return ((ours - theirs).norm() / theirs.norm()).item()

    return measure


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with five transformers, `vae`, `text_encoder` and `tokenizer`, in the published layout."""
    root = tmp_path_factory.mktemp("published")
    for name, config in KINDS.items():
        model = _randomized(CogVideoXTransformer3DModel.from_config(config.to_dict()), seed=1)
        if config.use_learned_positional_embeddings:
            model.patch_embed.pos_embedding.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(7))
        model.save_pretrained(root / name)
    _randomized(AutoencoderKLCogVideoX.from_config(SMALL_VAE.to_dict()), seed=2).save_pretrained(root / "vae")
    size = build_tokenizer(root / "tokenizer", ["a", "red", "circle", "moves", "left"], max_length=16)
    config = T5Config(vocab_size=size, d_model=20, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                      feed_forward_proj="gated-gelu")  # fmt: skip
    _randomized(T5EncoderModel(config), seed=3).save_pretrained(root / "text_encoder")
    return root


@pytest.fixture(scope="session")
def as_sat():
    """`as_sat("vae", weights)`: tensors with diffusers' names as the official training code stores them, no prefix."""
    return lambda part, weights: (_sat_vae if part == "vae" else _sat_transformer)(dict(weights))


def _sat_transformer(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of `w`, written out from the published list of names: fused q, k, v, and twelve chunks a block."""
    sat = {}
    for kind in ("weight", "bias"):
        for theirs, ours in (
            ("time_embed.0", "time_embedding.linear_1"),
            ("time_embed.2", "time_embedding.linear_2"),
            ("ofs_embed.0", "ofs_embedding.linear_1"),
            ("ofs_embed.2", "ofs_embedding.linear_2"),
            ("mixins.patch_embed.proj", "patch_embed.proj"),
            ("mixins.patch_embed.text_proj", "patch_embed.text_proj"),
            ("transformer.final_layernorm", "norm_final"),
            ("mixins.final_layer.norm_final", "norm_out.norm"),
            ("mixins.final_layer.adaLN_modulation.1", "norm_out.linear"),
            ("mixins.final_layer.linear", "proj_out"),
        ):
            if f"{ours}.{kind}" in w:
                sat[f"{theirs}.{kind}"] = w.pop(f"{ours}.{kind}")
        for i in range(2):
            block, layer = f"transformer_blocks.{i}", f"transformer.layers.{i}"
            qkv = [w.pop(f"{block}.attn1.to_{part}.{kind}") for part in "qkv"]
            sat[f"{layer}.attention.query_key_value.{kind}"] = torch.cat(qkv)
            sat[f"{layer}.attention.dense.{kind}"] = w.pop(f"{block}.attn1.to_out.0.{kind}")
            sat[f"{layer}.mlp.dense_h_to_4h.{kind}"] = w.pop(f"{block}.ff.net.0.proj.{kind}")
            sat[f"{layer}.mlp.dense_4h_to_h.{kind}"] = w.pop(f"{block}.ff.net.2.{kind}")
            sat[f"{layer}.input_layernorm.{kind}"] = w.pop(f"{block}.norm1.norm.{kind}")
            sat[f"{layer}.post_attention_layernorm.{kind}"] = w.pop(f"{block}.norm2.norm.{kind}")
            sat[f"mixins.adaln_layer.query_layernorm_list.{i}.{kind}"] = w.pop(f"{block}.attn1.norm_q.{kind}")
            sat[f"mixins.adaln_layer.key_layernorm_list.{i}.{kind}"] = w.pop(f"{block}.attn1.norm_k.{kind}")
            a, b = w.pop(f"{block}.norm1.linear.{kind}").chunk(2), w.pop(f"{block}.norm2.linear.{kind}").chunk(2)
            sat[f"mixins.adaln_layer.adaLN_modulations.{i}.1.{kind}"] = torch.cat([a[0], b[0], a[1], b[1]])
    if "patch_embed.pos_embedding" in w:
        sat["mixins.pos_embed.pos_embedding"] = w.pop("patch_embed.pos_embedding")
    assert not w
    return sat


def _sat_vae(w: dict[str, Tensor]) -> dict[str, Tensor]:
    sat = {}
    for name, tensor in w.items():
        parts = name.replace("conv_shortcut", "nin_shortcut").split(".")
        if parts[1] == "mid_block":
            parts[1:4] = ["mid", f"block_{int(parts[3]) + 1}"]
        elif parts[1] in ("down_blocks", "up_blocks"):
            level = int(parts[2]) if parts[1] == "down_blocks" else 3 - int(parts[2])
            inner = {"resnets": ["block", parts[4]], "downsamplers": ["downsample"], "upsamplers": ["upsample"]}
            parts[1:5] = [parts[1].split("_")[0], str(level), *inner[parts[3]]]
        sat[".".join(parts)] = tensor
    return sat


# What a file may hold instead of one of its values.
ODDITIES = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**30,
    0.5,
    1e308,
    float("nan"),
    "",
    "x" * 5000,
    "\0",
    [],
    {},
    [[]],
    "../x",
]


def _spoiled(content: bytes, suffix: str, rng: random.Random) -> bytes:
    """The content with one to three accidents: of its JSON's values, or of its bytes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        if suffix == ".json" and rng.random() < 0.7:
            try:
                content = json.dumps(_spoiled_value(json.loads(content), rng)).encode()
                continue
            except ValueError:
                pass  # an accident before this one left no JSON: its bytes are damaged further
        at, size = rng.randrange(len(content) + 1), rng.choice((1, 4, 60, 5000))
        if rng.random() < 0.5:
            at = min(at, rng.randrange(64))  # headers stand in front
        kind = rng.randrange(5)
        if kind == 0:
            content = content[:at]
        elif kind == 1:
            content = content[:at] + rng.randbytes(size) + content[at:]
        elif kind == 2:
            content = content[:at] + content[at + size :]
        elif kind == 3:
            content = content[:at] + rng.randbytes(size) + content[at + size :]
        elif at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    return content


def _spoiled_value(value, rng: random.Random):
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        change = rng.randrange(8)
        if change == 0:
            return {k: v for k, v in value.items() if k != key}
        if change == 1:
            return value | {key + rng.choice("x_/"): value[key]}
        return value | {key: _spoiled_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], _spoiled_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODDITIES)


@pytest.fixture(scope="session")
def spoiled():
    """`spoiled(content, suffix, rng)`: what a file held, with one to three accidents."""
    return _spoiled
