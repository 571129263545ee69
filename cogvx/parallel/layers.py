"""What each layer of the VAE reads: the sizes that bytes and operations follow from."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..models.vae import CausalConv3d, Decoder, Encoder


@dataclass(frozen=True)
class Layer:
    """A causal convolution, or one that changes the size of frames, and the shape [B, C, T, H, W] that it reads."""

    module: nn.Module
    shape: torch.Size

    @property
    def is_causal(self) -> bool:
        return isinstance(self.module, CausalConv3d)


def layers_of(half: Encoder | Decoder, shape: torch.Size, first_alone: bool) -> Iterator[Layer]:
    """The convolutions that a chunk of this shape passes through, in their order, but for those of single pixels.

    first_alone: as in `cogvx.models.vae.Halos`.
    """
    (batch, _, frames, height, width), decodes = shape, isinstance(half, Decoder)

    def read(module: nn.Module) -> Layer:
        return Layer(module, torch.Size((batch, module.conv.in_channels, frames, height, width)))

    yield read(half.conv_in)
    for block in [half.mid_block, *half.up_blocks] if decodes else [*half.down_blocks, half.mid_block]:
        for resnet in block.resnets:
            yield read(resnet.conv1)
            yield read(resnet.conv2)
        for resize in getattr(block, "upsamplers" if decodes else "downsamplers", ()):
            yield read(resize)
            height, width = (2 * height, 2 * width) if decodes else (height // 2, width // 2)
            if decodes and resize.double_time:
                frames = 2 * frames - (first_alone and frames % 2)
            elif not decodes and resize.halve_time:
                frames = (frames + 1) // 2
    yield read(half.conv_out)


def result_shape(half: Encoder | Decoder, shape: torch.Size, first_alone: bool) -> torch.Size:
    """Of what a half makes of a chunk."""
    *_, last = layers_of(half, shape, first_alone)
    return torch.Size((shape[0], half.conv_out.conv.out_channels, *last.shape[2:]))
