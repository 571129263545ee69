"""The VAE in tiles of a frame, for a peak of memory that a tile sets and not the frame.

`blend` computes overlapping tiles each by itself and blends them linearly. It is fast, but every tile has its own
GroupNorm statistics, so that the result differs from the untiled one. `exact` is the untiled result within rounding:
each layer runs over all tiles before the next one, statistics are gathered over all of them, and a tile is read with
the pixels around it that its convolution sees. What lies between two layers waits on the host.

B batch, C channels, T frames, H W height and width. Spans are [start, stop), in latent pixels unless said.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor, nn

from .exact_tiles import ExactTiles
from .vae import Decoder, Encoder, Halos, in_chunks

KINDS = ("blend", "exact")
Span = tuple[int, int]


class TilingError(ValueError):
    """A tile that cannot work; the message names the argument, its value and what is valid."""


@dataclass(frozen=True)
class Tiling:
    """How frames are cut: `vae.tiling = Tiling("blend", 240, 360, overlap=64)`; None is not at all.

    height, width: the most of a tile, in pixels, multiples of 8. overlap: the least that tiles of `blend` share, in
    pixels, a multiple of 8 below the tile's size. Tiles are spread evenly, so that none is a narrow rest.

    Raises TilingError for settings that cannot work.
    """

    kind: str
    height: int
    width: int
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TilingError(f"kind of a tiling is {self.kind!r}; valid: {', '.join(map(repr, KINDS))}")
        for name in ("height", "width", "overlap"):
            value, least = getattr(self, name), 0 if name == "overlap" else 8
            if isinstance(value, bool) or not isinstance(value, int) or value < least or value % 8:
                what = f"a multiple of 8 pixels, at least {least}"
                raise TilingError(f"{name} of a tiling is {value!r}; it must be {what}")
        if self.kind == "exact" and self.overlap:
            raise TilingError(f"overlap of a tiling is {self.overlap}; exact tiles need none, leave it out")
        if self.overlap >= min(self.height, self.width):
            size = f"{self.height} x {self.width}"
            raise TilingError(f"overlap of a tiling is {self.overlap}; it must be less than the tile of {size}")

    def __call__(
        self, half: Encoder | Decoder, chunks: Iterable[Tensor], num_chunks: int, first_alone: bool = True
    ) -> Iterator[Tensor]:
        """What `in_chunks` gives, tile by tile."""
        unit = 2 ** (len(half.up_blocks if isinstance(half, Decoder) else half.down_blocks) - 1)
        if self.height % unit or self.width % unit:
            raise TilingError(f"the tile is {self.height} x {self.width}; this VAE takes multiples of {unit} pixels")
        factors = (1, unit) if isinstance(half, Decoder) else (unit, 1)
        chunks = iter(chunks)
        first = next(chunks)
        size = first.shape[3] // factors[0], first.shape[4] // factors[0]
        cut = partition if self.kind == "exact" else overlapping
        tiles = self.height // unit, self.width // unit
        rows, columns = (cut(n, tile, self.overlap // unit) for n, tile in zip(size, tiles, strict=True))
        given = _again(first, chunks)
        del first
        if len(rows) == len(columns) == 1:
            return in_chunks(half, given, num_chunks, True, first_alone)
        if self.kind == "exact":
            return ExactTiles(half, rows, columns)(given, num_chunks, first_alone)
        return blended(half, given, num_chunks, rows, columns, factors, first_alone)


def partition(size: int, tile: int, overlap: int = 0) -> list[Span]:
    """The fewest spans of at most `tile` that fill `size` side by side, of about one length."""
    count = -(-size // tile)
    return list(pairwise(round(i * size / count) for i in range(count + 1)))


def overlapping(size: int, tile: int, overlap: int) -> list[Span]:
    """The fewest spans of exactly `tile` that fill `size` and share at least `overlap`, spread evenly."""
    if tile >= size:
        return [(0, size)]
    count = math.ceil((size - overlap) / (tile - overlap))
    starts = [round(i * (size - tile) / (count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]


def blending(spans: list[Span], factor: int, device: torch.device) -> list[Tensor]:
    """The weight of each span at each of its pixels, linear where two overlap; at every pixel they add up to one."""
    size = spans[-1][1] * factor
    weights = torch.zeros(len(spans), size)
    for i, (start, stop) in enumerate(spans):
        weights[i, start * factor : stop * factor] = 1.0
    for i, (left, right) in enumerate(pairwise(spans)):
        shared = (left[1] - right[0]) * factor
        if shared > 0:
            rising, here = (torch.arange(shared) + 0.5) / shared, slice(right[0] * factor, left[1] * factor)
            weights[i, here] *= 1 - rising
            weights[i + 1, here] *= rising
    weights /= weights.sum(0)  # where more than two overlap
    return [row[a * factor : b * factor].to(device) for row, (a, b) in zip(weights, spans, strict=True)]


def blended(
    half: nn.Module,
    chunks: Iterable[Tensor],
    num_chunks: int,
    rows: list[Span],
    columns: list[Span],
    factors: tuple[int, int],  # pixels a latent pixel has in what is given, and in the result
    first_alone: bool = True,
) -> Iterator[Tensor]:
    """A half of the VAE over overlapping tiles; their halos wait on the host."""
    device = next(half.parameters()).device
    weights = [blending(spans, factors[1], device) for spans in (rows, columns)]
    halos = {at: Halos(on_host=True) for at in product(range(len(rows)), range(len(columns)))}
    size = rows[-1][1] * factors[1], columns[-1][1] * factors[1]
    for number, chunk in enumerate(chunks):
        result = None
        for (i, j), kept in halos.items():
            kept.last, kept.first_alone = number == num_chunks - 1, first_alone and number == 0
            tile = half(_cut(chunk, rows[i], columns[j], factors[0]), kept)
            if result is None:
                result = tile.new_zeros(*tile.shape[:3], *size, dtype=torch.promote_types(tile.dtype, torch.float32))
            weight = weights[0][i][:, None] * weights[1][j]
            _cut(result, rows[i], columns[j], factors[1]).addcmul_(tile.to(result.dtype), weight.to(result.dtype))
        yield result.to(tile.dtype)


def _cut(x: Tensor, rows: Span, columns: Span, factor: int) -> Tensor:
    return x[..., rows[0] * factor : rows[1] * factor, columns[0] * factor : columns[1] * factor]


def _again(first: Tensor, others: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from others
