"""The untiled VAE's result out of tiles: layer by layer over all of them, what lies between two layers on the host.

A convolution reads a tile with the pixel around it that it sees, outside of the frame zeros as ever. A norm takes its
mean and variance from all tiles, by the law of total variance, then is applied where the convolution after it reads,
so that its result is never written out. The device holds one tile of one layer at a time.

A canvas is a whole chunk on the host, [B, C, T, H, W], channels last.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvx_kernels import causal_conv3d
from cogvx_kernels.spatial_norm_silu.reference import resize_nearest

from ..host import empty_on_host, to_device
from .vae import (
    CausalConv3d,
    Decoder,
    Downsample,
    Encoder,
    GroupNormSiLU,
    Halos,
    ResidualBlock,
    SpatialNormSiLU,
    behind_halo,
)

Norm = GroupNormSiLU | SpatialNormSiLU


@dataclass(frozen=True)
class Box:
    """A part of a frame, [top, bottom) x [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, x: Tensor) -> Tensor:
        return x[..., self.top : self.bottom, self.left : self.right]

    def grown(self, size: tuple[int, int], before: int, after: int) -> "Box":
        """With pixels around it, as far as there are any in the frame."""
        top, left = max(self.top - before, 0), max(self.left - before, 0)
        return Box(top, min(self.bottom + after, size[0]), left, min(self.right + after, size[1]))

    def within(self, outer: "Box") -> "Box":
        """The same pixels, counted from the corner of a box around it."""
        top, left = self.top - outer.top, self.left - outer.left
        return Box(top, top + self.bottom - self.top, left, left + self.right - self.left)

    def scaled(self, up: int, down: int = 1) -> "Box":
        return Box(*(edge * up // down for edge in (self.top, self.bottom, self.left, self.right)))


class ExactTiles:
    """A half of the VAE over tiles that lie side by side; rows and columns are their spans in latent pixels."""

    def __init__(self, half: Encoder | Decoder, rows: list[tuple[int, int]], columns: list[tuple[int, int]]):
        self.half, self.device = half, next(half.parameters()).device
        self.tiles = [Box(*rows_of, *columns_of) for rows_of, columns_of in product(rows, columns)]
        self.latent_height = rows[-1][1]

    def __call__(self, chunks: Iterable[Tensor], num_chunks: int, first_alone: bool = True) -> Iterator[Tensor]:
        halos = Halos()
        run = self.decode if isinstance(self.half, Decoder) else self.encode
        for i, chunk in enumerate(chunks):
            halos.last, halos.first_alone = i == num_chunks - 1, first_alone and i == 0
            yield to_device(run(chunk, halos), self.device)

    def encode(self, video: Tensor, halos: Halos) -> Tensor:
        encoder = self.half
        x = self.conv(encoder.conv_in, video, None, None, halos)
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                x = self.resnet(resnet, x, None, halos)
            for downsample in block.downsamplers:
                x = self.resize(downsample, x)
        for resnet in encoder.mid_block.resnets:
            x = self.resnet(resnet, x, None, halos)
        return self.conv(encoder.conv_out, x, encoder.norm_out, None, halos)

    def decode(self, z: Tensor, halos: Halos) -> Tensor:
        decoder = self.half
        x = self.conv(decoder.conv_in, z, None, z, halos)
        for resnet in decoder.mid_block.resnets:
            x = self.resnet(resnet, x, z, halos)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self.resnet(resnet, x, z, halos)
            for upsample in block.upsamplers:
                x = self.resize(upsample, x, halos.first_alone)
        return self.conv(decoder.conv_out, x, decoder.norm_out, z, halos)

    def resnet(self, block: ResidualBlock, x: Tensor, z: Tensor | None, halos: Halos) -> Tensor:
        y = self.conv(block.conv1, x, block.norm1, z, halos)
        return self.conv(block.conv2, y, block.norm2, z, halos, x, block.conv_shortcut)

    def conv(
        self,
        conv: CausalConv3d,
        x: Tensor,  # a canvas
        norm: Norm | None,
        z: Tensor | None,  # the latents, on the device
        halos: Halos,
        residual: Tensor | None = None,  # a canvas
        shortcut: nn.Module | None = None,  # what the residual passes through
    ) -> Tensor:
        """A norm, if any, and the convolution after it, plus the residual; the halo of the next chunk into `halos`."""
        before, size = halos.pop(conv, None), x.shape[3:]
        after = None if halos.last else empty_on_host((*x.shape[:2], 2, *size), x)
        y = empty_on_host((len(x), conv.conv.out_channels, *x.shape[2:]), x)
        statistics = None if norm is None else self.statistics(norm, x)
        for tile in self.at_size_of(x):
            around = tile.grown(size, 1, 1)
            part = to_device(around.of(x), self.device)
            if norm is not None:
                part = normalized(part, norm, statistics, z, around, size)
            part = behind_halo(part, None if before is None else to_device(around.of(before), self.device))
            inner = tile.within(around)
            if after is not None:
                tile.of(after).copy_(inner.of(part)[:, :, -2:])
            result = inner.of(causal_conv3d(part, conv.conv.weight, conv.conv.bias))
            del part
            if residual is not None:
                result = result + shortcut(to_device(tile.of(residual), self.device))
            tile.of(y).copy_(result)
        if after is not None:
            halos[conv] = after
        return y

    def statistics(self, norm: Norm, x: Tensor) -> tuple[Tensor, Tensor]:  # [B, groups] each, in float64
        """Mean and variance of every group over all tiles."""
        groups, counts, means, variances = group_norm_of(norm).num_groups, [], [], []
        for tile in self.at_size_of(x):
            part = to_device(tile.of(x), self.device)
            part = part.to(torch.promote_types(part.dtype, torch.float32)).unflatten(1, (groups, -1))
            variance, mean = torch.var_mean(part, dim=(2, 3, 4, 5), correction=0)
            counts.append(part[0, 0].numel())
            means.append(mean.double())
            variances.append(variance.double())
        shares = [count / sum(counts) for count in counts]
        mean = sum(share * m for share, m in zip(shares, means, strict=True))
        parts = zip(shares, means, variances, strict=True)
        return mean, sum(share * (v + (m - mean).square()) for share, m, v in parts)

    def resize(self, layer: nn.Module, x: Tensor, *how: bool) -> Tensor:
        """An up- or downsampling: each tile with the pixels around it that the layer's convolution sees."""
        is_down, size, y = isinstance(layer, Downsample), x.shape[3:], None
        up, down = (1, 2) if is_down else (2, 1)
        for tile in self.at_size_of(x):
            around = tile.grown(size, 0 if is_down else 1, 1)
            result = layer(to_device(around.of(x), self.device), *how)
            target = tile.scaled(up, down)
            if y is None:
                y = empty_on_host((*result.shape[:3], size[0] * up // down, size[1] * up // down), x)
            target.of(y).copy_(target.within(around.scaled(up, down)).of(result))
        return y

    def at_size_of(self, x: Tensor) -> list[Box]:
        factor = x.shape[3] // self.latent_height
        return [tile.scaled(factor) for tile in self.tiles]


def group_norm_of(norm: Norm) -> nn.GroupNorm:
    return norm if isinstance(norm, GroupNormSiLU) else norm.norm_layer


def normalized(
    x: Tensor,  # [B, C, T, h, w], a part of the frame
    norm: Norm,
    statistics: tuple[Tensor, Tensor],
    z: Tensor | None,
    box: Box,  # where x lies
    size: tuple[int, int],  # of the frame
) -> Tensor:
    """The norm by given statistics, and SiLU; the sums in fp32 as in the whole norm."""
    group_norm, (mean, variance) = group_norm_of(norm), statistics
    width = x.shape[1] // group_norm.num_groups
    slope = (variance + group_norm.eps).rsqrt().repeat_interleave(width, dim=1) * group_norm.weight
    shift = group_norm.bias - mean.repeat_interleave(width, dim=1) * slope
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y.mul(_per_channel(slope, y)).add_(_per_channel(shift, y))
    if isinstance(norm, SpatialNormSiLU):
        y.mul_(at_pixels(z, norm.conv_y["conv"], y.shape[2], box, size))
        y.add_(at_pixels(z, norm.conv_b["conv"], y.shape[2], box, size))
    return F.silu(y, inplace=True).to(x.dtype)


def at_pixels(z: Tensor, conv: nn.Conv3d, num_frames: int, box: Box, size: tuple[int, int]) -> Tensor:
    """A 1x1x1 convolution of the latents, resized by nearest to the frame, at the pixels of a box."""
    factor = size[0] // z.shape[3]
    outer = Box(box.top // factor, -(-box.bottom // factor), box.left // factor, -(-box.right // factor))
    small = conv(outer.of(z))
    frames = resize_nearest(torch.arange(z.shape[2], dtype=torch.float32).view(1, 1, -1, 1, 1), (num_frames, 1, 1))
    small = small.index_select(2, frames.flatten().long().to(z.device))
    for dim, start, stop, first in ((3, box.top, box.bottom, outer.top), (4, box.left, box.right, outer.left)):
        small = small.index_select(dim, torch.arange(start, stop, device=z.device) // factor - first)
    return small


def _per_channel(values: Tensor, like: Tensor) -> Tensor:  # [B, C]
    return values[:, :, None, None, None].to(like.dtype)
