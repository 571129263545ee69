"""What each process computes and hands out for one video, and how long that would take: a model, not a measurement.

Operations are counted in the products that are most of a model, each multiplication and addition as one; bytes are
those that `cogvx.parallel.links` counts in a run, of the same kinds and equal to the byte. Time is operations at one
rate and bytes over one link, one after the other, as if none was hidden behind work. Processes that compute the same
(text, the modulation, the sampler, an image's latents, the mp4) are left out.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..config import TransformerConfig, VAEConfig
from ..denoise import window_length
from ..diffusion.windows import window_starts
from ..models.choices import encode_chunks, first_alone
from ..models.exact_tiles import group_norm_of
from ..models.loading import hollow
from ..models.vae import CausalVAE, Decoder, Downsample, Encoder, GroupNormSiLU, SpatialNormSiLU
from ..models.vae import encode_chunks as eights
from ..numerics import SAT, Numerics
from ..settings import Configs, Settings
from .frames import halo_shape
from .layers import Layer, layers_of, result_shape
from .split import Layout, length, lengths
from .ways import Ways, chunks, sequence

FLOPS = 300e12  # a second, of one GPU
LINK = 50e9  # bytes a second that one GPU hands out
TAPS = 27  # of a causal convolution


@dataclass(frozen=True)
class Work:
    """Of one video, or of several made at once."""

    configs: Configs
    settings: Settings  # resolved
    dtype: torch.dtype
    vae_dtype: torch.dtype
    numerics: Numerics = SAT
    batch: int = 1

    @property
    def calls(self) -> int:
        """How often the transformer sees a sequence; the two sides of guidance together, or each where they are."""
        num_latents, config = self.settings.latent_shape(self.configs)[1], self.configs.transformer
        window = window_length(config)
        in_windows = self.settings.longer == "windows" and num_latents > window
        return self.settings.num_moves * (len(window_starts(num_latents, window, window // 2)) if in_windows else 1)


@dataclass(frozen=True)
class Share:
    """What one process does."""

    sampling: float  # operations
    decoding: float  # operations, encoding included where there is something to encode
    sent: Counter[str]  # bytes, by what they are for

    def seconds(self, flops: float = FLOPS, link: float = LINK) -> float:
        return (self.sampling + self.decoding) / flops + sum(self.sent.values()) / link


def share_of(work: Work, ways: Ways, process: int) -> Share:
    """What process number `process` of those that share a video in these ways computes and hands out."""
    sampling, sent = transformer_share(work, ways, process)
    decoding, more = vae_share(work, ways, process)
    return Share(sampling, decoding, sent + more)


def slowest(work: Work, ways: Ways, flops: float = FLOPS, link: float = LINK) -> Share:
    """What the process does that takes longest by this model."""
    shares = [share_of(work, ways, process) for process in range(ways.size)]
    return max(shares, key=lambda share: share.seconds(flops, link))


def transformer_share(work: Work, ways: Ways, process: int) -> tuple[float, Counter[str]]:
    """Operations and bytes of the transformer, all steps together."""
    config, itemsize = work.configs.transformer, work.dtype.itemsize
    num_text, num_vision = sequence(work.configs, work.settings, work.numerics)
    layout = Layout(num_text + num_vision, num_text, ways.heads, ways.tokens)
    place, column = divmod(process % (ways.heads * ways.tokens), ways.heads)
    sides = 2 if work.settings.is_guided and ways.guidance == 1 else 1
    heads = lengths(config.num_attention_heads, ways.heads)[column]
    sent = sent_by_layers(config, layout, place, column, heads)
    sent["patches"] = sent_patches(config, layout, place, column)
    sent = Counter({what: count * sides * work.batch * itemsize for what, count in sent.items()})
    if ways.guidance > 1:
        # What both sides find has the size of a sequence's patches.
        sent["sides"] = num_vision * config.out_channels * math.prod(config.patch) * work.batch * itemsize
    own, row = layout.tokens_in(place)[column], layout.tokens_of_rows[place]
    a_layer = 24 * own * config.width**2 + 4 * row * layout.num_tokens * heads * config.attention_head_dim
    operations = float(a_layer * config.num_layers * sides * work.batch)
    return operations * work.calls, Counter({what: n * work.calls for what, n in sent.items() if n})


def sent_by_layers(config: TransformerConfig, layout: Layout, place: int, column: int, heads: int) -> Counter[str]:
    """Numbers that attention hands out in all layers, for one sequence."""
    width, rows = config.attention_head_dim, layout.tokens_of_rows
    own, others = layout.tokens_in(place)[column], rows[place] - layout.tokens_in(place)[column]
    traded = 3 * own * (config.num_attention_heads - heads) + others * heads
    # Its own keys and values, then those that come to it, but for the last ones.
    passed = sum(2 * rows[(place - i) % layout.rows] * heads for i in range(layout.rows - 1))
    return Counter(heads=traded * width * config.num_layers, keys=passed * width * config.num_layers)


def sent_patches(config: TransformerConfig, layout: Layout, place: int, column: int) -> int:
    """Numbers that are handed out of what was predicted, for one sequence."""
    own, row = length(layout.vision(place * layout.columns + column)), layout.vision_of_rows[place]
    per_token = config.out_channels * math.prod(config.patch)
    return (own * (layout.columns - 1) + row * (layout.rows - 1)) * per_token


def vae_share(work: Work, ways: Ways, process: int) -> tuple[float, Counter[str]]:
    """Operations and bytes of the VAE's chunks."""
    vae, (_, _, height, width) = _vae(work.configs.vae), work.settings.latent_shape(work.configs)
    channels, decoded = work.configs.vae.latent_channels, chunks(work.configs, work.settings, work.numerics)
    alone = first_alone(sum(decoded), work.numerics)
    shapes = [torch.Size((work.batch, channels, n, height, width)) for n in decoded]
    operations, sent = half_share(vae.decoder, shapes, alone, work.vae_dtype, ways, process)
    if work.settings.strength is None:
        return operations, sent
    count, size = work.settings.num_frames, (work.settings.height, work.settings.width)
    shapes = [torch.Size((1, 3, n, *size)) for n in encode_chunks(count, work.numerics) or eights(count)]
    more = half_share(vae.encoder, shapes, True, work.vae_dtype, ways, process)
    return operations + more[0], sent + more[1]


@lru_cache(maxsize=1)
def _vae(config: VAEConfig) -> CausalVAE:
    return hollow(CausalVAE, config)


def half_share(
    half: Encoder | Decoder, shapes: list[torch.Size], alone: bool, dtype: torch.dtype, ways: Ways, process: int
) -> tuple[float, Counter[str]]:
    """Operations and bytes of the chunks of these shapes, as far as a process is dealt them or has rows of them."""
    operations, sent = 0.0, Counter()
    for i, shape in enumerate(shapes):
        layers = list(layers_of(half, shape, alone and i == 0))
        result = result_shape(half, shape, alone and i == 0)
        if ways.rows > 1:
            share, more = rows_share(half, layers, result, dtype, ways, process)
            operations, sent = operations + share * operations_of(layers), sent + more
        elif len(shapes) == 1 or ways.frames == 1:
            operations += operations_of(layers)
        elif i % ways.frames == process:
            operations += operations_of(layers)
            halos = [halo_shape(layer) for layer in layers if layer.is_causal and i + 1 < len(shapes)]
            sent["halos"] += sum(map(math.prod, halos)) * dtype.itemsize
            sent["frames"] += math.prod(result) * dtype.itemsize * (ways.size - 1)
    return operations, sent


def rows_share(
    half: Encoder | Decoder, layers: list[Layer], result: torch.Size, dtype: torch.dtype, ways: Ways, process: int
) -> tuple[float, Counter[str]]:
    """The share of the rows that a process has, and the bytes that it hands out."""
    height, neighbours = min(layer.shape[3] for layer in layers), (process > 0) + (process < ways.rows - 1)
    share = lengths(height, ways.rows)[process] / height
    # A step of two sees the row below alone, so that a strip gives away its first row and not its last one.
    rows = sum(
        math.prod(layer.shape) // layer.shape[3] * (process > 0 if isinstance(layer.module, Downsample) else neighbours)
        for layer in layers
    )
    norms = [module for module in half.modules() if isinstance(module, GroupNormSiLU | SpatialNormSiLU)]
    moments = sum(2 * group_norm_of(norm).num_groups for norm in norms) * result[0] * torch.float64.itemsize
    others = ways.size - 1
    frames = round(share * math.prod(result)) * dtype.itemsize * others
    return share, Counter(rows=rows * dtype.itemsize, moments=moments * others, frames=frames)


def operations_of(layers: list[Layer]) -> float:
    """Those of the causal convolutions, which are nearly all."""
    return sum(
        2.0 * TAPS * math.prod(layer.shape) * layer.module.conv.out_channels for layer in layers if layer.is_causal
    )
