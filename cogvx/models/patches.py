"""From latents to tokens and back: patches, and what is added to tell where a patch was.

B batch, C channels, T H W patches along time, height and width, each of q x p x p latent pixels, L text tokens,
D width, N = L + T H W tokens, text first.
"""

import math

import torch
from torch import Tensor, nn

from ..config import TransformerConfig
from .embeddings import Grid, first_rows, resampled, sincos_positions
from .linear import Linear

Added = tuple[Tensor | None, Tensor | None]  # to text [L, D], to vision [N - L, D]


class PatchEmbed(nn.Module):
    """Text and latent patches as tokens of one width, text first."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config, size = config, config.patch_size
        if config.patch_size_t is None:
            self.proj = nn.Conv2d(config.in_channels, config.width, size, stride=size, bias=config.patch_bias)
        else:
            self.proj = Linear(config.in_channels * math.prod(config.patch), config.width)
        self.text_proj = Linear(config.text_embed_dim, config.width)
        if config.use_learned_positional_embeddings:
            self.pos_embedding = nn.Parameter(torch.zeros(1, config.num_positions, config.width))

    def forward(self, latents: Tensor, text: Tensor, added: Added) -> Tensor:  # [B, N, D]
        if isinstance(self.proj, nn.Conv2d):
            frames = self.proj(latents.transpose(1, 2).flatten(0, 1))  # [B T, D, H, W]
            vision = frames.unflatten(0, (latents.shape[0], -1)).flatten(3).transpose(2, 3).flatten(1, 2)
        else:
            vision = self.proj(patchify(latents, self.config.patch))
        parts = zip((self.text_proj(text), vision), added, strict=True)
        return torch.cat([x if table is None else x + table.to(x.dtype) for x, table in parts], dim=1)

    def positions(self, grid: Grid, num_text: int, rule: str) -> Added:
        """What is added to text and vision tokens. Raises ValueError for a grid that `rule` has no positions for."""
        config, trained = self.config, self.config.trained_grid
        if config.use_learned_positional_embeddings:
            return self.learned_positions(grid, num_text, rule)
        if config.use_rotary_positional_embeddings:
            return None, None
        if rule == "sliced":
            return None, first_rows(self.sincos(trained), grid)
        if rule == "resampled":
            raise ValueError(
                "table is 'resampled', but this model has no learned table; let it be recomputed or sliced"
            )
        return None, self.sincos(grid)

    def learned_positions(self, grid: Grid, num_text: int, rule: str) -> Added:
        most, trained = self.config.max_text_seq_length, self.config.trained_grid
        if num_text > most:
            raise ValueError(f"text has {num_text} tokens; this model has positions for at most {most}")
        text, vision = self.pos_embedding[0].split([most, math.prod(trained)])
        if rule == "recomputed" and grid != trained:
            if grid[1:] != trained[1:]:
                what = f"a learned table is recomputed at the trained {trained[1]} x {trained[2]} patches alone"
                raise ValueError(f"the grid is {grid[1]} x {grid[2]} patches; {what}, let it be resampled")
            return None, self.sincos(grid)
        return text[:num_text], first_rows(vision, grid) if rule == "sliced" else resampled(vision, grid, trained)

    def sincos(self, grid: Grid) -> Tensor:
        config = self.config
        scales = config.spatial_interpolation_scale, config.temporal_interpolation_scale
        return sincos_positions(grid, config.width, *scales, self.proj.weight.device)


def patchify(
    latents: Tensor,  # [B, C, T q, H p, W p]
    patch: tuple[int, int, int],  # q, p, p
) -> Tensor:  # [B, T H W, C q p p]
    x = latents
    for axis, size in zip((2, 4, 6), patch, strict=True):
        x = x.unflatten(axis, (-1, size))  # at the end [B, C, T, q, H, p, W, p]
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(
    tokens: Tensor,  # [B, T H W, C q p p]
    grid: Grid,  # T, H, W
    patch: tuple[int, int, int],  # q, p, p
) -> Tensor:  # [B, C, T q, H p, W p]
    x = tokens.unflatten(1, grid).unflatten(-1, (-1, *patch))  # [B, T, H, W, C, q, p, p]
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
