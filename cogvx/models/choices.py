"""What the choices of `Numerics` mean for the models' parts."""

import math

from ..config import TransformerConfig, VAEConfig
from ..numerics import DIFFUSERS, Numerics, NumericsError
from .embeddings import Placement, default_placement, intrinsic_frequency
from .image_latents import default_scaling

MOST_CHUNKS = 10  # that the official code decodes a clip in
MOST_OF_1_0 = 13  # latents of the longest clip of the 1.0 models, which all code decodes alike


def num_text_tokens(config: TransformerConfig, numerics: Numerics) -> int:
    """How many tokens a prompt becomes; there is a choice for the 226 of CogVideoX 1.5 alone."""
    length = config.max_text_seq_length
    chosen = config.patch_size_t is not None and length == DIFFUSERS.text_tokens_1_5
    return numerics.text_tokens_1_5 if chosen else length


def last_norm_eps(config: TransformerConfig, numerics: Numerics) -> float:
    """eps of the last modulated LayerNorm; diffusers takes the config's."""
    chosen = numerics.last_norm_eps
    return config.norm_eps if chosen == DIFFUSERS.last_norm_eps else chosen


def placement(
    config: TransformerConfig, numerics: Numerics, latents: tuple[int, int, int], riflex: bool = False
) -> Placement:
    """Where patches of latents T, H, W lie, with `riflex` for clips longer than trained.

    Raises NumericsError where a sliced table is too short for them.
    """
    usual, trained = default_placement(config), config.trained_grid
    rope = "sliced" if numerics.rope_positions == "sliced" else usual.rope
    table = "sliced" if numerics.sincos_table == "sliced" else usual.table
    count = math.prod(n // p for n, p in zip(latents, config.patch, strict=True))
    has_table = config.use_learned_positional_embeddings or not config.use_rotary_positional_embeddings
    if table == "sliced" and has_table and count > math.prod(trained):
        what = f"{count} patches, and the table that it slices has {math.prod(trained)}"
        raise NumericsError(f"sincos_table of numerics is 'sliced'; the video has {what}: choose 'recomputed'")
    longer = riflex and latents[0] // config.patch[0] > trained[0]
    intrinsic = intrinsic_frequency(trained[0], config.attention_head_dim) if longer else None
    return Placement(rope, table, intrinsic, rounded=numerics.rope_dtype == "model")


def image_scaling(config: VAEConfig, numerics: Numerics) -> str:
    """How an image's latent is scaled; there is a choice for CogVideoX 1.5 alone."""
    usual = default_scaling(config)
    return numerics.image_latent_1_5 if usual == "divided" else usual


def encode_chunks(num_frames: int, numerics: Numerics) -> list[int] | None:
    """Frames of each chunk that a video is encoded in; None is diffusers' eights."""
    return [num_frames] if numerics.vae_encode_chunks == "whole" else None


def decode_chunks(num_latents: int, numerics: Numerics) -> list[int] | None:
    """Latent frames of each chunk that they are decoded in; None is diffusers' twos."""
    count = min(MOST_CHUNKS, num_latents // 2)
    if numerics.vae_decode_chunks == "pairs" or count < MOST_CHUNKS:
        return None
    return [num_latents // count + (i < num_latents % count) for i in range(count)]


def first_alone(num_latents: int, numerics: Numerics) -> bool:
    """Whether the first of these latents is decoded to one frame, where all others become four."""
    four_each = numerics.odd_latents == "four_each" and num_latents > MOST_OF_1_0
    return num_latents % 2 == 1 and not four_each
