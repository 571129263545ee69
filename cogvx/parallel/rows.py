"""The VAE split in space: a frame's rows in strips over processes, with the result of the whole frame within rounding.

A convolution reads the row next to its strip from the process that has it; a norm takes its mean and variance from all
strips, by the law of total variance. So every process holds its strip of every layer and no more, whatever the chunk.

B batch, C channels, T frames, H W height and width of a whole frame, h of a strip.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from cogvx_kernels import causal_conv3d

from ..models.exact_tiles import Box, ExactTiles, Norm, group_norm_of, normalized
from ..models.fp16 import overflowed, widened
from ..models.vae import CausalConv3d, Decoder, Downsample, Encoder, Halos, behind_halo
from .links import Link
from .split import lengths, spans


class SplitRows:
    """`vae.tiling = SplitRows(link)`: every process computes its rows of every chunk, and gets the whole result."""

    def __init__(self, link: Link):
        self.link = link

    def __call__(
        self, half: Encoder | Decoder, chunks: Iterable[Tensor], num_chunks: int, first_alone: bool = True
    ) -> Iterator[Tensor]:
        """What `in_chunks` gives; from the first chunk on that fp16 cannot hold they are computed in fp32."""
        halos, dtype, decodes = Halos(), None, isinstance(half, Decoder)
        for i, chunk in enumerate(chunks):
            halos.last, halos.first_alone = i == num_chunks - 1, first_alone and i == 0
            before = dict(halos) if chunk.dtype == torch.float16 and dtype is None else {}
            strip = Strip(self.link, half, chunk.shape[3])
            run = strip.decode if decodes else strip.encode
            y = strip.gathered(run(chunk if dtype is None else chunk.to(dtype), halos))
            if overflowed(y):
                dtype = torch.float32
                halos.clear()
                halos.update({conv: halo.float() for conv, halo in before.items()})
                y = strip.gathered(run(chunk.float(), halos))
            yield y


class Strip(ExactTiles):
    """A half of the VAE over the rows of this process; what `ExactTiles` has as a canvas is here a strip.

    height: of what the half reads.
    """

    def __init__(self, link: Link, half: Encoder | Decoder, height: int):
        self.link, self.half = link, half
        factor = 1 if isinstance(half, Decoder) else 2 ** sum(len(block.downsamplers) for block in half.down_blocks)
        self.height = height // factor  # in latent pixels
        self.span = spans(lengths(self.height, link.size))[link.rank]

    def scale(self, x: Tensor) -> int:
        """How many rows of a strip there are for one of latents."""
        return x.shape[3] // (self.span.stop - self.span.start)

    def rows(self, x: Tensor) -> slice:
        """Where the rows of a strip lie in its frame."""
        return slice(self.span.start * self.scale(x), self.span.stop * self.scale(x))

    def own(self, x: Tensor) -> Tensor:
        """Of a whole frame, the rows of this process."""
        scale = x.shape[3] // self.height
        return x[:, :, :, self.span.start * scale : self.span.stop * scale]

    def conv(
        self,
        conv: CausalConv3d,
        x: Tensor,  # a strip; before the first convolution the whole frame
        norm: Norm | None,
        z: Tensor | None,
        halos: Halos,
        residual: Tensor | None = None,  # a strip
        shortcut: nn.Module | None = None,
    ) -> Tensor:
        x = self.own(x) if conv is self.half.conv_in else x
        rows = self.rows(x)
        statistics = None if norm is None else self.statistics(norm, x)
        part, above = self.with_rows_around(x, 1, 1)
        if norm is not None:
            size = self.height * self.scale(x), x.shape[4]
            around = Box(rows.start - above, rows.start - above + part.shape[3], 0, size[1])
            latents = None if z is None else z.to(next(norm.parameters()).dtype)
            part = normalized(part, norm, statistics, latents, around, size)
        part = behind_halo(part, halos.pop(conv, None))
        if not halos.last:
            halos[conv] = part[:, :, -2:].clone()
        weights = (weight.to(part.dtype) for weight in (conv.conv.weight, conv.conv.bias))
        y = causal_conv3d(part, *weights)[:, :, :, above : above + x.shape[3]]
        return y if residual is None else y + in_dtype_of(residual, shortcut)

    def statistics(self, norm: Norm, x: Tensor) -> tuple[Tensor, Tensor]:  # [B, groups] each, in float64
        """Mean and variance of every group over all strips."""
        part = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (group_norm_of(norm).num_groups, -1))
        variance, mean = torch.var_mean(part, dim=(2, 3, 4, 5), correction=0)
        own = torch.stack([mean.double(), variance.double()])[None]
        means, variances = self.link.gathered("moments", own, [1] * self.link.size, dim=0).unbind(1)
        shares = torch.tensor(lengths(self.height, self.link.size), dtype=means.dtype, device=x.device) / self.height
        shares = shares[:, None, None]
        mean = (shares * means).sum(0)
        return mean, (shares * (variances + (means - mean).square())).sum(0)

    def resize(self, layer: nn.Module, x: Tensor, *how: bool) -> Tensor:
        is_down = isinstance(layer, Downsample)
        part, above = self.with_rows_around(x, 0 if is_down else 1, 1)
        y = in_dtype_of(part, layer, *how)
        return y[:, :, :, : x.shape[3] // 2] if is_down else y[:, :, :, 2 * above : 2 * (above + x.shape[3])]

    def with_rows_around(self, x: Tensor, before: int, after: int) -> tuple[Tensor, int]:
        """A strip with rows of the strips around it, as far as there are any, and how many were added above it."""
        rank, last = self.link.rank, self.link.size - 1
        nothing, row = x[:, :, :, :0], (*x.shape[:3], 1, x.shape[4])
        given, shapes = [nothing] * self.link.size, [nothing.shape] * self.link.size
        above, below = min(before, rank), min(after, last - rank)
        if rank > 0 and after:
            given[rank - 1] = x[:, :, :, :1]
        if rank < last and before:
            given[rank + 1] = x[:, :, :, -1:]
        for other, count in ((rank - 1, above), (rank + 1, below)):
            if count:
                shapes[other] = row
        found = self.link.exchange("rows", given, shapes)
        parts = [*([found[rank - 1]] if above else []), x, *([found[rank + 1]] if below else [])]
        return torch.cat(parts, dim=3).contiguous(memory_format=torch.channels_last_3d), above

    def gathered(self, y: Tensor) -> Tensor:
        """Whole frames of everybody's strips."""
        heights = [n * self.scale(y) for n in lengths(self.height, self.link.size)]
        return self.link.gathered("frames", y, heights, dim=3)


def in_dtype_of(x: Tensor, layer: nn.Module, *rest: bool) -> Tensor:
    """A layer of x, in the dtype of x: its own, or a wider one."""
    same = all(weight.dtype == x.dtype for weight in layer.parameters())
    return layer(x, *rest) if same else widened(layer, x.dtype)(x, *rest)
