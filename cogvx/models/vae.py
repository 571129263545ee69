"""The causal video VAE: 8 x 8 in space and 4 in time, chunk by chunk with halos.

B batch, C channels, T frames, H W height and width; K = 3 taps in time, so a halo is the last 2 frames that a causal
convolution read. Videos are [B, 3, T, H, W] in [-1, 1], latents [B, 16, (T - 1) / 4 + 1, H / 8, W / 8], unscaled.

A clip passes in temporal chunks. GroupNorm takes its statistics from one chunk, so the chunk plan is part of the
result. Submodule names are those of the published checkpoints. In memory channels come last, [B, T, H, W, C].

Source: "CogVideoX" (arXiv 2408.06072), section 2.1, and the released configurations.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvx_kernels import (
    causal_conv3d,
    causal_conv3d_for_norm,
    downsample_conv,
    group_norm_silu,
    spatial_norm_silu,
    upsample_conv,
)

from ..config import VAEConfig
from ..host import to_device, to_host
from .fp16 import overflowed, widened
from .loading import ConfigLike, load_model
from .saving import SHARD_BYTES, save_model


class Halos(dict[nn.Module, Tensor]):
    """What each causal convolution read last; empty before the first chunk, and nothing is kept of the `last`.

    on_host: they wait in the host's memory. Of 480 x 720 pixels in 16 bits they are 2.8 GB.
    first_alone: of an odd number of frames, where time doubles.
    """

    def __init__(self, on_host: bool = False):
        super().__init__()
        self.on_host, self.last, self.first_alone = on_host, False, True

    def take(self, conv: nn.Module, device: torch.device) -> Tensor | None:
        halo = self.pop(conv, None)
        return to_device(halo, device) if self.on_host and halo is not None else halo

    def keep(self, conv: nn.Module, frames: Tensor) -> None:  # a copy, so that the buffer they are in can be freed
        if not self.last:
            self[conv] = to_host(frames) if self.on_host else frames.clone()


class CausalVAE(nn.Module):
    """Video to latents and back."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.tiling: Any = None  # how frames are cut into tiles, a `cogvx.models.tiling.Tiling`; None is not at all
        self.halos_on_host = False  # what chunks pass on waits in the host's memory; tiles always do so

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        config: ConfigLike = None,
    ) -> Self:
        """The VAE of a published folder: a pipeline's or the VAE's own, a hub name, "tiny", or one file.

        config: of a file that does not state it: a preset's name, a checkpoint's folder, or a VAEConfig.

        Raises:
            CheckpointError: the folder is no checkpoint, or a damaged, incomplete or unsafe one.
        """
        return load_model(cls, "vae", folder, dtype, device, config)

    def save_pretrained(self, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Write the VAE's own published folder; diffusers loads it too."""
        save_model(self, folder, shard_bytes)

    def encode(self, video: Tensor, chunks: list[int] | None = None) -> "Posterior":
        """The distribution of latents behind a video [B, 3, T, H, W] in [-1, 1]; chunks of None are `encode_chunks`.

        Where fp16 cannot hold what is computed, it is computed, and answered, in fp32.
        """
        lengths = chunks or encode_chunks(video.shape[2])
        return self.encode_each(video.split(lengths, dim=2), len(lengths))

    def encode_each(self, parts: Iterable[Tensor], num_parts: int) -> "Posterior":
        """The distribution of latents behind a video that comes in its chunks, [B, 3, t, H, W] each."""
        moments = joined(self._run(self.encoder, parts, num_parts))
        return Posterior(*moments.contiguous().chunk(2, dim=1))

    def decode(self, latents: Tensor, chunks: list[int] | None = None, first_alone: bool | None = None) -> Tensor:
        """The video [B, 3, T, H, W] behind unscaled latents [B, C, T, H, W]; nominally in [-1, 1], not clamped.

        chunks of None are `decode_chunks`. first_alone: the first latent gives one frame and all others four, else each
        of them four; None is the former for an odd number of latents. From the first chunk on that fp16 cannot hold,
        they are computed, and answered, in fp32.
        """
        return joined(self.decode_each(latents, chunks, first_alone)).contiguous()

    def decode_each(
        self, latents: Tensor, chunks: list[int] | None = None, first_alone: bool | None = None
    ) -> Iterator[Tensor]:
        """What `decode` gives, chunk by chunk [B, 3, t, H, W], each as soon as it is there; none is held here."""
        lengths = chunks or decode_chunks(latents.shape[2])
        alone = latents.shape[2] % 2 == 1 if first_alone is None else first_alone
        return self._run(self.decoder, latents.split(lengths, dim=2), len(lengths), alone)

    def _run(
        self, half: nn.Module, chunks: Iterable[Tensor], num_chunks: int, first_alone: bool = True
    ) -> Iterator[Tensor]:
        if self.tiling is not None:
            return self.tiling(half, chunks, num_chunks, first_alone)
        return in_chunks(half, chunks, num_chunks, self.halos_on_host, first_alone)


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents, [B, C, T, H, W] each."""

    mean: Tensor
    raw_logvar: Tensor

    @property
    def logvar(self) -> Tensor:
        return self.raw_logvar.clamp(-30.0, 20.0)

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=device)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)

    def kl(self) -> Tensor:
        """Divergence from the unit Gaussian, in nats a sample, [B]."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)


def in_chunks(
    half: nn.Module, chunks: Iterable[Tensor], num_chunks: int, halos_on_host: bool = False, first_alone: bool = True
) -> Iterator[Tensor]:
    """The results of a half of the VAE over the chunks of a clip, one after another, as each is ready.

    From the first chunk on that overflows in fp16 they are computed in fp32.
    """
    halos, run, dtype = Halos(halos_on_host), half, None
    for i, chunk in enumerate(chunks):
        halos.last, halos.first_alone = i == num_chunks - 1, first_alone and i == 0
        before = dict(halos) if chunk.dtype == torch.float16 and dtype is None else {}
        y = run(chunk if dtype is None else chunk.to(dtype), halos)
        if overflowed(y):
            run, dtype = widened(half, torch.float32), torch.float32
            halos.clear()
            halos.update({conv: halo.float() for conv, halo in before.items()})
            y = run(chunk.float(), halos)
        yield y


def joined(chunks: Iterable[Tensor]) -> Tensor:
    parts = list(chunks)
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def encode_chunks(num_frames: int) -> list[int]:
    """Frames of each chunk that the encoder takes: eights, the first with the remainder."""
    if num_frames < 8:
        return [num_frames]
    return [8 + num_frames % 8] + [8] * (num_frames // 8 - 1)


def decode_chunks(num_latents: int) -> list[int]:
    """Latent frames of each chunk that the decoder takes: twos, the first with the remainder."""
    if num_latents < 2:
        return [num_latents]
    return [2 + num_latents % 2] + [2] * (num_latents // 2 - 1)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        for level, (width_in, width) in enumerate(pairwise((widths[0], *widths))):
            last = level == len(widths) - 1
            block = nn.Module()
            block.resnets = nn.ModuleList(
                ResidualBlock(width_in if i == 0 else width, width, groups) for i in range(config.layers_per_block)
            )
            block.downsamplers = nn.ModuleList([] if last else [Downsample(width, config.halves_time(level))])
            self.down_blocks.append(block)
        self.mid_block = nn.Module()
        self.mid_block.resnets = nn.ModuleList(ResidualBlock(widths[-1], widths[-1], groups) for _ in range(2))
        self.norm_out = GroupNormSiLU(widths[-1], groups)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, video: Tensor, halos: Halos) -> Tensor:
        x, moments = self.conv_in(behind_halo(video, halos.take(self.conv_in, video.device)), halos, for_norm=True)
        for block in self.down_blocks:
            for resnet, for_norm in in_turn(block.resnets, for_norm=not block.downsamplers):
                x, moments = resnet(x, None, halos, moments, for_norm)
            for downsample in block.downsamplers:
                x, moments = downsample(x), None
        for resnet, for_norm in in_turn(self.mid_block.resnets, for_norm=True):
            x, moments = resnet(x, None, halos, moments, for_norm)
        return self.conv_out(self.norm_out(x, None, halos.take(self.conv_out, x.device), moments), halos)[0]


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups, latent = config.block_out_channels[::-1], config.norm_num_groups, config.latent_channels
        self.conv_in = CausalConv3d(latent, widths[0])
        self.mid_block = nn.Module()
        self.mid_block.resnets = nn.ModuleList(ResidualBlock(widths[0], widths[0], groups, latent) for _ in range(2))
        self.up_blocks = nn.ModuleList()
        for level, (width_in, width) in enumerate(pairwise((widths[0], *widths))):
            last = level == len(widths) - 1
            block = nn.Module()
            block.resnets = nn.ModuleList(
                ResidualBlock(width_in if i == 0 else width, width, groups, latent)
                for i in range(config.layers_per_block + 1)
            )
            block.upsamplers = nn.ModuleList([] if last else [Upsample(width, config.halves_time(level))])
            self.up_blocks.append(block)
        self.norm_out = SpatialNormSiLU(widths[-1], latent, groups)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    def forward(self, z: Tensor, halos: Halos) -> Tensor:
        x, moments = self.conv_in(behind_halo(z, halos.take(self.conv_in, z.device)), halos, for_norm=True)
        for resnet, for_norm in in_turn(self.mid_block.resnets, for_norm=True):
            x, moments = resnet(x, z, halos, moments, for_norm)
        for block in self.up_blocks:
            for resnet, for_norm in in_turn(block.resnets, for_norm=not block.upsamplers):
                x, moments = resnet(x, z, halos, moments, for_norm)
            for upsample in block.upsamplers:
                x, moments = upsample(x, halos.first_alone), None
        return self.conv_out(self.norm_out(x, z, halos.take(self.conv_out, x.device), moments), halos)[0]


def in_turn(blocks: nn.ModuleList, for_norm: bool) -> Iterator[tuple["ResidualBlock", bool]]:
    """Each of the residual blocks, and whether a norm follows it; `for_norm`: one follows the last.

    They are called by who holds what they read: a call for all of them would hold it until the last one is done.
    """
    for i, block in enumerate(blocks):
        yield block, for_norm or i < len(blocks) - 1


class ResidualBlock(nn.Module):
    """Two rounds of norm, SiLU and causal convolution; in the decoder the norms also read the latent z.

    `moments` are mean and variance of each channel of x, where they are known; `for_norm` as in CausalConv3d.
    """

    def __init__(self, width_in: int, width: int, groups: int, latent: int | None = None):
        super().__init__()
        norm = GroupNormSiLU if latent is None else SpatialNormSiLU
        extra = () if latent is None else (latent,)
        self.norm1 = norm(width_in, *extra, groups)
        self.conv1 = CausalConv3d(width_in, width)
        self.norm2 = norm(width, *extra, groups)
        self.conv2 = CausalConv3d(width, width)
        self.conv_shortcut = nn.Identity() if width_in == width else PointwiseConv(width_in, width)

    def forward(
        self, x: Tensor, z: Tensor | None, halos: Halos, moments: Tensor | None = None, for_norm: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        y, inner = self.conv1(self.norm1(x, z, halos.take(self.conv1, x.device), moments), halos, for_norm=True)
        y = self.norm2(y, z, halos.take(self.conv2, x.device), inner)
        if isinstance(self.conv_shortcut, nn.Identity):
            return self.conv2(y, halos, x, for_norm)
        # A shortcut comes last: before conv2 its result would be one more tensor where the most of them are held.
        return self.conv2(y, halos)[0].add_(self.conv_shortcut(x)), None


class PointwiseConv(nn.Conv3d):
    """A 1x1x1 convolution, as the matrix product over pixels that it is where channels come last.

    On CPUs the sums of torch's own depend on the number of threads.
    """

    def __init__(self, width_in: int, width: int):
        super().__init__(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


class CausalConv3d(nn.Module):
    """A 3x3x3 convolution that sees this frame and the two before it; leaves the next chunk's halo in `halos`.

    Beside the result there are, `for_norm`, mean and variance of each of its channels, and None where a norm that
    follows computes its own.
    """

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.conv = nn.Conv3d(width_in, width, 3, padding=(0, 1, 1))

    def forward(
        self, x: Tensor, halos: Halos, residual: Tensor | None = None, for_norm: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        halos.keep(self, x[:, :, -2:])
        args = x, self.conv.weight, self.conv.bias, residual
        return causal_conv3d_for_norm(*args) if for_norm else (causal_conv3d(*args), None)


class GroupNormSiLU(nn.GroupNorm):
    def __init__(self, width: int, groups: int):
        super().__init__(groups, width, eps=1e-6)

    def forward(self, x: Tensor, z: None, halo: Tensor | None, moments: Tensor | None = None) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, halo, self.num_groups, self.eps, 2, moments)


class SpatialNormSiLU(nn.Module):
    def __init__(self, width: int, latent: int, groups: int):
        super().__init__()
        self.norm_layer = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_y = nn.ModuleDict({"conv": nn.Conv3d(latent, width, 1)})
        self.conv_b = nn.ModuleDict({"conv": nn.Conv3d(latent, width, 1)})
        # An untrained spatial norm is a plain GroupNorm; with random scales training starts far slower.
        nn.init.ones_(self.conv_y["conv"].bias)
        nn.init.zeros_(self.conv_b["conv"].bias)

    def forward(self, x: Tensor, z: Tensor, halo: Tensor | None, moments: Tensor | None = None) -> Tensor:
        norm, y, b = self.norm_layer, self.conv_y["conv"], self.conv_b["conv"]
        return spatial_norm_silu(
            x, z, norm.weight, norm.bias, y.weight.flatten(1), y.bias, b.weight.flatten(1), b.bias,
            halo, norm.num_groups, norm.eps, 2, moments,
        )  # fmt: skip


class Downsample(nn.Module):
    """Half the height and width, and with `halve_time` the mean of frame pairs, an odd first frame kept alone."""

    def __init__(self, width: int, halve_time: bool):
        super().__init__()
        self.halve_time = halve_time
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.halve_time and x.shape[2] > 1:
            alone = x.shape[2] % 2
            means = (x[:, :, alone::2] + x[:, :, alone + 1 :: 2]) / 2
            x = torch.cat([x[:, :, :1], means], dim=2) if alone else means
        return downsample_conv(x, self.conv.weight, self.conv.bias)


class Upsample(nn.Module):
    """Twice the height and width, and with `double_time` twice the frames, where asked an odd first one kept alone."""

    def __init__(self, width: int, double_time: bool):
        super().__init__()
        self.double_time = double_time
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, first_alone: bool = True) -> Tensor:
        if self.double_time and not first_alone and x.shape[2] % 2:
            y = upsample_conv(x, self.conv.weight, self.conv.bias, False)
            return y.repeat_interleave(2, dim=2).contiguous(memory_format=torch.channels_last_3d)
        return upsample_conv(x, self.conv.weight, self.conv.bias, self.double_time)


def behind_halo(x: Tensor, halo: Tensor | None) -> Tensor:
    """[halo, x] along time, channels last; before the first chunk two copies of the first frame are the halo."""
    halo = x[:, :, :1].expand(-1, -1, 2, -1, -1) if halo is None else halo
    return torch.cat([halo, x], dim=2).contiguous(memory_format=torch.channels_last_3d)
