"""Small random checkpoints that the diffusers library wrote, every parameter drawn, norms and modulation included."""

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
