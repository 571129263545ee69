"""A perceptual distance: how far two videos are apart in the eyes of a network that looks at single frames.

Source: "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (LPIPS, arXiv 1801.03924).
"""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..models.checkpoint import CheckpointError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of RGB in [0, 1]
VGG16 = (64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)  # widths, a maximum taken in between
LINEAR = "lpips.safetensors"  # beside the backbone: the published weights of channels, lin0.model.1.weight ...

Features = Callable[[Tensor], Sequence[Tensor]]  # frames [N, 3, H, W] -> several of [N, C, h, w] or [N, tokens, C]


class PerceptualDistance(nn.Module):
    """The mean over places, sum over layers, of weighted squared differences of features of unit length.

    distance(output, video) of two [B, 3, T, H, W] in [-1, 1] is a mean over their frames. It never learns.
    """

    def __init__(
        self,
        features: Features,
        weights: Sequence[Tensor] | None = None,  # of each layer's channels, [C] each; None is 1 for all
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
    ):
        super().__init__()
        self.features = features.eval().requires_grad_(False) if isinstance(features, nn.Module) else features
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.weights = None if weights is None else nn.ParameterList(weights).requires_grad_(False)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "PerceptualDistance":
        """Over the network in a local folder: a VGG-16 by torchvision's names, or any that transformers loads.

        Weights of channels are read from `lpips.safetensors` where it is there. Raises CheckpointError for a folder
        that holds no such network.
        """
        folder = Path(folder)
        stored, config = folder / "model.safetensors", folder / "config.json"
        if not folder.is_dir() or not (stored.is_file() or config.is_file()):
            raise CheckpointError(f"{folder} is no backbone: it has neither model.safetensors nor config.json")
        features = HiddenStates(folder) if config.is_file() else ConvFeatures.from_file(stored)
        weights = None
        if (folder / LINEAR).is_file():
            linear = load_file(folder / LINEAR)
            weights = [linear[name].flatten() for name in sorted(linear)]
        return cls(features, weights, *_statistics(folder / "preprocessor_config.json"))

    def forward(self, output: Tensor, video: Tensor) -> Tensor:
        layers = zip(self._features(output), self._features(video), strict=True)
        weights = self.weights or iter(lambda: None, 0)
        total = 0.0
        for (ours, theirs), weight in zip(layers, weights, strict=self.weights is not None):
            squared = (F.normalize(ours, dim=1, eps=1e-10) - F.normalize(theirs, dim=1, eps=1e-10)).square()
            squared = squared if weight is None else squared * weight.view(1, -1, 1, 1)
            total = total + squared.sum(1).mean()
        return total

    def _features(self, video: Tensor) -> list[Tensor]:  # [B T, C, h, w] each
        frames = video.transpose(1, 2).flatten(0, 1)
        found = self.features(((frames + 1) / 2 - self.mean) / self.std)
        return [x if x.dim() == 4 else x.transpose(1, 2)[..., None] for x in found]


class ConvFeatures(nn.Module):
    """VGG's convolutions, or narrower ones; what is seen after each block's last, before the maximum is taken.

    With random weights it is a backbone too: it tells textures apart, though it was never taught to.
    """

    def __init__(self, blocks: Sequence[Sequence[int]] = VGG16):
        super().__init__()
        widths = [3, *(width for block in blocks for width in block)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.lengths = [len(block) for block in blocks]

    @classmethod
    def from_file(cls, file: Path) -> "ConvFeatures":
        """A VGG-16 as torchvision names its parts: features.0.weight, features.2.weight, ...; its classifier is left.

        Raises CheckpointError for a file of another network.
        """
        stored, model = load_file(file), cls()
        for conv, index in zip(model.convs, _places(model.lengths), strict=True):
            for part in ("weight", "bias"):
                tensor, own = stored.get(f"features.{index}.{part}"), getattr(conv, part)
                if tensor is None or tensor.shape != own.shape:
                    raise CheckpointError(f"{file} is no VGG-16: features.{index}.{part} must be {list(own.shape)}")
                own.data.copy_(tensor)
        return model

    @classmethod
    def random(cls, seed: int, blocks: Sequence[Sequence[int]] = ((16, 16), (32, 32), (64, 64))) -> "ConvFeatures":
        """Weights drawn from a seed, so that every layer keeps the size of what it sees."""
        generator, model = torch.Generator().manual_seed(seed), cls(blocks)
        for conv in model.convs:
            deviation = (2 / conv.weight[0].numel()) ** 0.5
            conv.weight.data.normal_(0.0, deviation, generator=generator)
            conv.bias.data.zero_()
        return model

    def forward(self, frames: Tensor) -> list[Tensor]:
        x, found, convs = frames, [], iter(self.convs)
        for i, length in enumerate(self.lengths):
            x = x if i == 0 else F.max_pool2d(x, 2)
            for _ in range(length):
                x = F.relu(next(convs)(x))
            found.append(x)
        return found


def _places(lengths: Sequence[int]) -> list[int]:
    """Where the convolutions stand among the layers: each has a ReLU behind it, each block a maximum."""
    places, at = [], 0
    for length in lengths:
        places += [at + 2 * i for i in range(length)]
        at += 2 * length + 1
    return places


class HiddenStates(nn.Module):
    """The hidden states of a network that transformers loads from a folder."""

    def __init__(self, folder: Path):
        super().__init__()
        from transformers import AutoModel

        try:
            self.model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder} holds no network that can be loaded: {error}") from error

    def forward(self, frames: Tensor) -> Sequence[Tensor]:
        return self.model(frames, output_hidden_states=True).hidden_states


def _statistics(file: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation that the network's pictures are given; ImageNet's where the folder does not say."""
    if not file.is_file():
        return IMAGENET
    content = json.loads(file.read_text())
    return content.get("image_mean", IMAGENET[0]), content.get("image_std", IMAGENET[1])
