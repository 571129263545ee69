"""The expert transformer on samples of any length and size at once, packed one after another into one sequence.

S samples; sample i has L_i text tokens and N_i tokens in all, text first. Fully connected layers see the whole sequence
[1, sum N_i, D] and so are as busy as with one long clip; attention stays within a sample, and each sample has its own
positions, timestep and text length. Nothing is padded.

Source: "CogVideoX" (arXiv 2408.06072), section 3.1, where it is called multi-resolution frame pack.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cogvx_kernels import joint_attention, qk_norm_rope

from .embeddings import Grid, Placement
from .patches import unpatchify
from .transformer import QK_EPS, ExpertBlock, ExpertTransformer, JointAttention, Rope, Stream


class Sample(NamedTuple):
    """What the transformer takes of one clip or picture."""

    latents: Tensor  # [C, T, H, W]
    text: Tensor  # [L, text_embed_dim]
    timestep: int  # 0 ... 999


class Layout(NamedTuple):
    """Where each sample stands in the sequence."""

    grids: list[Grid]  # T, H, W in patches
    num_texts: list[int]
    ropes: list[Rope]

    @property
    def lengths(self) -> list[int]:
        return [text + math.prod(grid) for text, grid in zip(self.num_texts, self.grids, strict=True)]


class PackedStream(NamedTuple):
    """`Stream` of each sample: the residuals apart, what the last sub-layer made of all of them together."""

    xs: list[Tensor]  # [1, N_i, D]
    gates: list[Tensor] | None = None  # [1, 2, D]
    y: Tensor | None = None  # [1, sum N_i, D]

    def apart(self, lengths: list[int]) -> list[Stream]:
        if self.y is None:
            return [Stream(x) for x in self.xs]
        return [Stream(*each) for each in zip(self.xs, self.gates, self.y.split(lengths, 1), strict=True)]


def forward_packed(
    model: ExpertTransformer,
    samples: Sequence[Sample],
    ofs: float | None = None,
    placement: Placement | None = None,
    checkpointing: bool = False,
) -> list[Tensor]:  # [out_channels, T, H, W] each
    """The velocity of every sample: what `model(...)` gives for each alone.

    checkpointing: keep the input of every block alone and compute the block again for the gradient, which is the same
    within rounding. Raises ValueError for a sample that the model cannot take, or none at all.
    """
    if not samples:
        raise ValueError("samples is empty; give at least one")
    device, dtype = model.proj_out.weight.device, model.proj_out.weight.dtype
    timesteps = torch.tensor([sample.timestep for sample in samples], device=device)
    modulation = model.modulate(timesteps, ofs).expand(len(samples))
    layout, xs = Layout([], [], []), []
    for sample, timestep in zip(samples, timesteps, strict=True):
        latents, text = sample.latents[None], sample.text[None]
        grid = model.check_shapes(latents, text, timestep[None])
        added, rope = model.positions(grid, text.shape[1], device, placement)
        xs.append(model.patch_embed(latents.to(dtype), text.to(dtype), added))
        for into, value in zip(layout, (grid, text.shape[1], rope), strict=True):
            into.append(value)
    stream = PackedStream(xs)
    for block, norms in zip(model.transformer_blocks, modulation.blocks.unbind(1), strict=True):
        if checkpointing and torch.is_grad_enabled():
            stream = PackedStream(block.run(recomputed_block, stream.xs, norms, layout))
        else:
            stream = block.run(packed_block, stream, norms, layout)
    visions = [
        model.norm_out(model.norm_final(each.vision(num_text)), last[None])
        for each, num_text, last in zip(stream.apart(layout.lengths), layout.num_texts, modulation.last, strict=True)
    ]
    made = model.proj_out(torch.cat(visions, dim=1)).split([vision.shape[1] for vision in visions], dim=1)
    return [unpatchify(y, grid, model.config.patch)[0] for y, grid in zip(made, layout.grids, strict=True)]


def packed_block(block: ExpertBlock, stream: PackedStream, norms: Tensor, layout: Layout) -> PackedStream:
    """`ExpertBlock`; norms [S, 2, 3, 2, D] are each sample's modulation of its two norms."""
    xs, y, gates = _normed(block.norm1, stream, norms[:, 0], layout)
    stream = PackedStream(xs, gates, packed_attention(block.attn1, y, layout))
    xs, y, gates = _normed(block.norm2, stream, norms[:, 1], layout)
    return PackedStream(xs, gates, block.ff(y))


def summed_block(block: ExpertBlock, xs: list[Tensor], norms: Tensor, layout: Layout) -> list[Tensor]:
    """The residuals behind a block, whole: one tensor to keep of each sample, where the unsummed parts are two."""
    parts = packed_block(block, PackedStream(xs), norms, layout).apart(layout.lengths)
    return [part.whole(num_text) for part, num_text in zip(parts, layout.num_texts, strict=True)]


def recomputed_block(block: ExpertBlock, xs: list[Tensor], norms: Tensor, layout: Layout) -> list[Tensor]:
    """`summed_block`, which keeps its inputs alone and computes again for the gradient."""
    return checkpoint(summed_block, block, xs, norms, layout, use_reentrant=False)


def packed_attention(attention: JointAttention, x: Tensor, layout: Layout) -> Tensor:  # [1, sum N_i, D]
    """`JointAttention`, in which a sample's tokens see that sample alone."""
    qkv = torch.cat([attention.to_q(x), attention.to_k(x), attention.to_v(x)], dim=-1)
    norm_q, norm_k, parts = attention.norm_q, attention.norm_k, []
    for own, rope, num_text in zip(qkv.split(layout.lengths, 1), layout.ropes, layout.num_texts, strict=True):
        affine = norm_q.weight, norm_q.bias, norm_k.weight, norm_k.bias
        parts.append(qk_norm_rope(own, *affine, *(rope or (None, None)), num_text, attention.num_heads, QK_EPS))
    q, k, v = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return attention.to_out[0](joint_attention(q, k, v, layout.lengths))


def _normed(
    norm, stream: PackedStream, modulation: Tensor, layout: Layout
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Each sample's residuals, the norms of all in one sequence, and each sample's gate."""
    each = zip(stream.apart(layout.lengths), modulation.split(1), layout.num_texts, strict=True)
    xs, normed, gates = zip(*(norm(*one) for one in each), strict=True)
    return list(xs), torch.cat(normed, dim=1), list(gates)
