"""The expert transformer: text and vision in one sequence that shares every weight but the modulation.

B batch, C channels, T H W latent frames, height and width, D width, A heads, E head width, L text tokens,
N = L + (T / q) (H / p) (W / p) tokens, for patches of q x p x p. Text comes first in every [B, N, D]. Module names are
those of the published checkpoints.

Source: "CogVideoX" (arXiv 2408.06072), section 2.2, and the released configurations.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvx_kernels import expert_layernorm, gated_expert_layernorm, qk_norm_rope

from ..config import TransformerConfig
from .eight_bits import EightBitLinear
from .embeddings import Grid, Placement, default_placement, rope_positions, timestep_embedding
from .fp16 import LARGEST, in_range, is_fp16, overflowed, widened
from .hooked import Hooked
from .linear import Linear
from .loading import ConfigLike, load_model
from .modulation import Modulation, ModulationTable
from .patches import Added, PatchEmbed, unpatchify
from .saving import SHARD_BYTES, save_model
from .sequence import WHOLE, Rope, WholeSequence
from .step_cache import StepCache

OFS = 2.0  # what every model that takes an ofs was trained with, and always
QK_EPS = 1e-6  # of the per-head norms of q and k; all others take the config's norm_eps


class ExpertTransformer(Hooked, nn.Module):
    """Predicts the velocity v of noisy latents, given text and the diffusion timestep."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.time_embedding = TimeEmbedding(config.width, config.time_embed_dim)
        if config.ofs_embed_dim is not None:
            self.ofs_embedding = TimeEmbedding(config.ofs_embed_dim, config.time_embed_dim)
        self.transformer_blocks = nn.ModuleList(ExpertBlock(config) for _ in range(config.num_layers))
        self.norm_final = nn.LayerNorm(config.width, config.norm_eps)
        self.norm_out = LastNorm(config)
        self.proj_out = Linear(config.width, config.out_channels * math.prod(config.patch))
        self.loras: dict[str, Any] = {}  # see `cogvx.models.lora`
        self.table: ModulationTable | None = None  # what is left of the modulation once its weights are released
        self.sequence = WHOLE

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        config: ConfigLike = None,
    ) -> Self:
        """The transformer of a published folder: a pipeline's or its own, a hub name, "tiny", or one file.

        config: of a file of no released size: a preset's name, a checkpoint's folder, or a TransformerConfig.

        Raises:
            CheckpointError: the folder is no checkpoint, or a damaged, incomplete or unsafe one.
        """
        return load_model(cls, "transformer", folder, dtype, device, config)

    def save_pretrained(self, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Write the transformer's own published folder; diffusers loads it too.

        Raises ValueError for a model without its modulation weights.
        """
        self._refuse_if_released("saved")
        save_model(self, folder, shard_bytes)

    def forward(
        self,
        latents: Tensor,  # [B, in_channels, T, H, W]; image to video: noisy ones, then the image's
        text: Tensor,  # [B, L, text_embed_dim]
        timestep: Tensor,  # [B], 0 ... 999
        modulation: Modulation | None = None,  # of that timestep, where a table has it
        ofs: float | None = None,  # of the models that take one; None is the 2.0 they were trained with
        placement: Placement | None = None,  # at sizes other than the trained ones; None is `default_placement`
        careful: bool = False,  # for fp16: nothing overflows, see below
        cache: StepCache | None = None,  # what skips the blocks where they would change little
    ) -> Tensor:  # [B, out_channels, T, H, W]
        """The velocity.

        careful: the residual stream and all norms are computed in fp32, and so is every sub-layer whose result, or
        whose logits, fp16 might not hold; the velocity is then fp32 too. In other dtypes it changes nothing but that.
        """
        own, num_text, patch = self.proj_out.weight.dtype, text.shape[1], self.config.patch
        dtype = torch.float32 if careful and own == torch.float16 else own
        grid = self.check_shapes(latents, text, timestep)
        added, rope = self.positions(grid, num_text, latents.device, placement)
        modulation = (modulation or self.modulate(timestep, ofs)).expand(len(latents))
        modulation = modulation.to(dtype) if own == torch.float16 else modulation
        tokens = in_range(self.patch_embed, latents.to(dtype), text.to(own), added)
        tokens, rope, num_text = self.sequence.own(tokens, rope, num_text)
        start = [Stream(tokens)]
        del tokens  # of which the stream may hold a part alone

        def blocks() -> Tensor:
            return self.through_blocks(start.pop(), modulation.blocks, rope, num_text)

        # No name holds what the blocks read, which is free again behind the first one.
        vision = blocks() if cache is None else cache(start[0].x[:, num_text:], modulation.blocks[:, 0, 0], blocks)
        vision = (widened(self.norm_final, dtype) if dtype != own else self.norm_final)(vision)
        patches = self.sequence.whole(in_range(self.proj_out, self.norm_out(vision, modulation.last)))
        return unpatchify(patches, grid, patch)

    def through_blocks(self, stream: "Stream", norms: Tensor, rope: Rope, num_text: int) -> Tensor:  # [B, N - L, D]
        """The vision tokens behind the blocks. norms: [B, layers, 2, 3, 2, D]."""
        for block, own in zip(self.transformer_blocks, norms.unbind(1), strict=True):
            stream = block(stream, own, rope, num_text)
        return stream.vision(num_text)

    def fits_fp16(self) -> bool:
        """Whether fp16 holds attention's logits, whatever the input; what else can overflow shows in the result."""
        return all(block.attn1.logits_fit() for block in self.transformer_blocks)

    def share(self, sequence: WholeSequence) -> None:
        """Compute with the tokens that `sequence` says are here; WHOLE is all of them."""
        self.sequence = sequence
        for block in self.transformer_blocks:
            block.attn1.attention = sequence.attention

    def modulate(self, timestep: Tensor, ofs: float | None = None) -> Modulation:  # [B]
        """Shift, scale and gate of every norm at a timestep.

        Raises ValueError for a timestep or an ofs that is not in the table of a model without its modulation weights,
        and for an ofs given to a model that takes none.
        """
        ofs = self.check_ofs(ofs)
        if self.table is not None:
            return self.table.at(*timestep.tolist(), ofs=ofs)
        made = self._modulation(timestep, ofs, self.proj_out.weight.dtype)
        return self._modulation(timestep, ofs, torch.float32) if overflowed(*made) else made

    def _modulation(self, timestep: Tensor, ofs: float | None, dtype: torch.dtype) -> Modulation:
        condition = in_range(self.time_embedding, timestep_embedding(timestep, self.config.width).to(dtype))
        if ofs is not None:
            value = timestep_embedding(torch.full((1,), ofs, device=timestep.device), self.config.ofs_embed_dim)
            condition = condition + in_range(self.ofs_embedding, value.to(dtype))
        condition = F.silu(condition)
        norms = [norm.modulate(condition) for block in self.transformer_blocks for norm in (block.norm1, block.norm2)]
        return Modulation(torch.stack(norms, 1).unflatten(1, (-1, 2)), self.norm_out.modulate(condition))

    def check_ofs(self, ofs: float | None) -> float | None:
        """The ofs of a call, None for a model that takes none. Raises ValueError where one is given to such a model."""
        if self.config.ofs_embed_dim is None:
            if ofs is not None:
                raise ValueError(f"ofs is {ofs}, but this model takes none; leave it out")
            return None
        if ofs is None:
            return OFS
        if isinstance(ofs, bool) or not isinstance(ofs, int | float) or not math.isfinite(ofs):
            raise ValueError(f"ofs is {ofs!r}; it must be a finite number, {OFS} as in training")
        return float(ofs)

    @torch.no_grad()
    def tabulate(self, timesteps: Sequence[int], batch: int = 1, ofs: float | None = None) -> ModulationTable:
        """The modulation of each of these timesteps, for `forward(..., modulation=table.at(timestep))`.

        A product's last bits may depend on how many rows it has: with the `batch` of the calls to come, those give the
        same bits as without a table on a CPU (in widths that its vectors divide, as the released ones are). Raises
        ValueError where the weights are released and a timestep or this ofs was not kept.
        """
        ofs = self.check_ofs(ofs)
        if self.table is None:
            device = self.proj_out.weight.device
            rows = [self.modulate(torch.full((batch,), timestep, device=device), ofs) for timestep in timesteps]
            return ModulationTable(timesteps, [Modulation(*(part[:1] for part in row)) for row in rows], ofs)
        for timestep in timesteps:
            self.table.row(timestep, ofs)
        return self.table

    def release_modulation(self, timesteps: Sequence[int], ofs: float | None = None) -> None:
        """Keep the modulation of these timesteps and free the weights that make it: a fifth of 2B's, a seventh of 5B's.

        The model then takes those timesteps and this ofs alone, and can be neither trained nor saved.
        """
        table = self.eval().tabulate(timesteps, ofs=ofs)
        self.table, self.time_embedding, self.ofs_embedding = table, None, None
        for module in self.modules():
            if isinstance(module, ModulatedNorm | LastNorm):
                module.linear = None

    def train(self, mode: bool = True) -> Self:
        """Raises ValueError for a model without its modulation weights."""
        if mode:
            self._refuse_if_released("trained")
        return super().train(mode)

    def _refuse_if_released(self, what: str) -> None:
        if self.table is not None:
            raise ValueError(f"the modulation weights of this transformer were released, so it cannot be {what}")

    def positions(
        self, grid: Grid, num_text: int, device: torch.device, placement: Placement | None = None
    ) -> tuple[Added, Rope]:
        """What is added to text and to vision tokens, and what rotates the latter; None where nothing does."""
        config, rope = self.config, None
        placement = placement or default_placement(config)
        if config.use_rotary_positional_embeddings:
            rules = placement.rope, placement.intrinsic
            rope = rope_positions(grid, config.trained_grid[1:], config.attention_head_dim, device, *rules)
            if placement.rounded:
                rope = tuple(part.to(self.proj_out.weight.dtype) for part in rope)
        return self.patch_embed.positions(grid, num_text, placement.table), rope

    def check_shapes(self, latents: Tensor, text: Tensor, timestep: Tensor) -> Grid:
        """The grid of patches, T, H, W. Raises ValueError for shapes that the model cannot take."""
        config = self.config
        if latents.dim() != 5 or latents.shape[1] != config.in_channels or 0 in latents.shape:
            wanted = f"[B, {config.in_channels}, T, H, W]"
            raise ValueError(f"latents have shape {list(latents.shape)}, but this model takes {wanted}")
        batch, sizes = len(latents), latents.shape[2:]
        for name, size, patch in zip(("num_frames", "height", "width"), sizes, config.patch, strict=True):
            if size % patch:
                # A clip is filled up and cut again, a picture takes the size that is closest.
                nearest = -(-size // patch) * patch if name == "num_frames" else max(patch, round(size / patch) * patch)
                raise ValueError(f"latents have {name} {size}, which is no multiple of {patch}; try {nearest}")
        if text.dim() != 3 or text.shape[0] != batch or text.shape[2] != config.text_embed_dim:
            wanted = f"[{batch}, L, {config.text_embed_dim}]"
            raise ValueError(f"text has shape {list(text.shape)}, but these latents and this model take {wanted}")
        if timestep.shape != (batch,):
            raise ValueError(f"timestep has shape {list(timestep.shape)}, but these latents take [{batch}]")
        return tuple(size // patch for size, patch in zip(sizes, config.patch, strict=True))

    @torch.no_grad()
    def init_for_training(self) -> Self:
        """Draw fresh weights: every block starts as the identity, the last layer as a small random map."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # of a convolution, the map from patch to width
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, ModulatedNorm | LastNorm):
                nn.init.zeros_(module.linear.weight)
        for module in self.modules():
            if isinstance(module, TimeEmbedding):
                nn.init.normal_(module.linear_1.weight, std=0.02)
                nn.init.normal_(module.linear_2.weight, std=0.02)
        if self.config.use_learned_positional_embeddings:
            nn.init.zeros_(self.patch_embed.pos_embedding)
        return self


class Stream(NamedTuple):
    """The residual stream; what the last sub-layer made is added to it by the norm that comes next, in one pass."""

    x: Tensor  # [B, N, D]
    gate: Tensor | None = None  # [B, 2, D], of text, then of vision
    y: Tensor | None = None  # [B, N, D]

    def vision(self, num_text: int) -> Tensor:  # [B, N - L, D]
        """The vision tokens of the sum x + gate y."""
        if self.y is None:
            return self.x[:, num_text:]
        return torch.addcmul(self.x[:, num_text:], self.gate[:, 1:], self.y[:, num_text:])

    def whole(self, num_text: int) -> Tensor:  # [B, N, D]
        """The sum x + gate y, in the dtype of x."""
        gate, y = self.gate.to(self.x.dtype), self.y.to(self.x.dtype)
        text = torch.addcmul(self.x[:, :num_text], gate[:, :1], y[:, :num_text])
        return torch.cat([text, torch.addcmul(self.x[:, num_text:], gate[:, 1:], y[:, num_text:])], dim=1)


class ExpertBlock(Hooked, nn.Module):
    """Attention over text and vision together, then an MLP, each behind a norm that the timestep modulates."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm1 = ModulatedNorm(config)
        self.attn1 = JointAttention(config)
        self.norm2 = ModulatedNorm(config)
        self.ff = FeedForward(config.width)

    def forward(
        self,
        stream: Stream,
        norms: Tensor,  # [B, 2, 3, 2, D], the modulation of norm1 and norm2
        rope: Rope,
        num_text: int,
    ) -> Stream:
        x, y, gate = self.norm1(stream, norms[:, 0], num_text)
        x, y, gate = self.norm2(Stream(x, gate, self.attend(y, rope, num_text)), norms[:, 1], num_text)
        return Stream(x, gate, in_range(self.ff, y))

    def attend(self, y: Tensor, rope: Rope, num_text: int) -> Tensor:
        if y.dtype == torch.float32 and is_fp16(self.attn1) and not self.attn1.logits_fit():
            return widened(self.attn1, y.dtype)(y, rope, num_text)
        return in_range(self.attn1, y, rope, num_text)


class ModulatedNorm(nn.Module):
    """LayerNorm with one affine, then a shift and a scale from the timestep, different for text and vision."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 6 * config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def modulate(self, condition: Tensor) -> Tensor:  # [B, time_embed_dim] -> [B, 3, 2, D]
        # The six chunks are shift, scale, gate of vision, then of text; the operators want text first.
        return in_range(self.linear, condition).unflatten(1, (2, 3, -1)).flip(1).transpose(1, 2)

    def forward(
        self,
        stream: Stream,
        modulation: Tensor,  # [B, 3, 2, D]
        num_text: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The stream with its last sub-layer added, its norm, and the gate of the sub-layer that reads that."""
        shift, scale, gate = modulation.unbind(1)
        weight, bias = (x.to(stream.x.dtype) for x in (self.norm.weight, self.norm.bias))
        norm = weight, bias, shift, scale, num_text, self.norm.eps
        if stream.y is None:
            return stream.x, expert_layernorm(stream.x, *norm), gate
        return *gated_expert_layernorm(stream.x, stream.y, stream.gate, *norm), gate


class LastNorm(nn.Module):
    """LayerNorm of the vision tokens, with a shift and a scale from the timestep."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 2 * config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def modulate(self, condition: Tensor) -> Tensor:  # [B, time_embed_dim] -> [B, 2, D]
        return in_range(self.linear, condition).unflatten(1, (2, -1))

    def forward(self, vision: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation[:, :, None].expand(-1, -1, 2, -1).unbind(1)  # one for both experts
        weight, bias = (x.to(vision.dtype) for x in (self.norm.weight, self.norm.bias))
        return expert_layernorm(vision, weight, bias, shift, scale, 0, self.norm.eps)


class JointAttention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.num_heads, self.attention = config.num_attention_heads, WHOLE.attention
        self.norm_q = nn.LayerNorm(config.attention_head_dim, QK_EPS)
        self.norm_k = nn.LayerNorm(config.attention_head_dim, QK_EPS)
        self.to_q = Linear(config.width, config.width)
        self.to_k = Linear(config.width, config.width)
        self.to_v = Linear(config.width, config.width)
        self.to_out = nn.ModuleList([Linear(config.width, config.width)])

    def forward(self, x: Tensor, rope: Rope, num_text: int) -> Tensor:
        # Three calls, not one product over joined weights, so that LoRA and quantised layers can take their place.
        qkv = torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], dim=-1)
        norm_q, norm_k = self.norm_q, self.norm_k
        cos, sin = rope or (None, None)
        q, k, v = qk_norm_rope(
            qkv, norm_q.weight, norm_q.bias, norm_k.weight, norm_k.bias, cos, sin, num_text, self.num_heads, QK_EPS
        )
        return self.to_out[0](self.attention(q, k, v))

    def logits_fit(self) -> bool:
        """Whether |q k| stays within fp16 for every input: |q| <= sqrt(E) max|weight| + |bias|, k likewise."""
        lengths = [
            norm.weight.abs().max().double() * norm.weight.numel() ** 0.5 + norm.bias.double().norm()
            for norm in (self.norm_q, self.norm_k)
        ]
        return bool(lengths[0] * lengths[1] <= LARGEST)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        up, down = Linear(width, 4 * width), Linear(4 * width, width)
        self.net = nn.ModuleList([nn.ModuleDict({"proj": up}), nn.Identity(), down])  # names: net.0.proj, net.2

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.net[0]["proj"], self.net[2]
        # GELU inside the product where that layer is still ours, and where no gradient needs what GELU saw.
        if type(up) in (Linear, EightBitLinear) and not torch.is_grad_enabled():
            return down(up(x, gelu=True))
        return down(F.gelu(up(x), approximate="tanh"))


class TimeEmbedding(nn.Module):
    def __init__(self, width: int, time_width: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))
