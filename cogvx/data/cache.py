"""Latents and text embeddings on disk, computed once: keyed by what they were made from and by what made them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..models.checkpoint import save_tensors
from ..models.image_latents import SIGMA_LOG_MEAN, SIGMA_LOG_STD, add_noise, posteriors
from ..models.text import TextEncoder
from ..models.vae import CausalVAE
from .clips import Clip
from .pixels import to_tensor

Model = TypeVar("Model")


class Cache:
    """Tensors by key in a folder; those that are damaged are computed again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.computed = 0  # how many were not there

    def get(self, kind: str, key: dict[str, object], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `compute()` gave when it was first called with this key."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        file = self.folder / f"{kind}-{digest[:32]}.safetensors"
        try:
            return load_file(file)
        except (OSError, SafetensorError):  # absent, or cut short by another program: ours are renamed when whole
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = compute()
            self.computed += 1
            save_tensors(tensors, file)
            return tensors


class Loaded(Generic[Model]):
    """A model that is loaded when it is first needed, and whose dtype is known before."""

    def __init__(self, load: Callable[[], Model], dtype: torch.dtype):
        self.load, self.dtype, self._model = load, dtype, None

    @property
    def model(self) -> Model:
        self._model = self.load() if self._model is None else self._model
        return self._model

    def free(self) -> None:
        self._model = None


@torch.no_grad()
def latents_of(
    cache: Cache, clip: Clip, vae: Loaded[CausalVAE], vae_hash: str, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a clip's unscaled latents, [C, T, H, W] each, in fp32.

    whole: it is encoded at once, else in chunks of eight frames, as `vae_encode_chunks` of `Numerics` says.
    """

    def compute() -> dict[str, Tensor]:
        pixels = to_tensor(clip.read()[None]).to(next(vae.model.parameters()))
        posterior = vae.model.encode(pixels, [pixels.shape[2]] if whole else None)
        mean, std = posterior.mean[0].float(), (0.5 * posterior.logvar[0]).exp().float()
        return {"mean": mean.cpu().contiguous(), "std": std.cpu().contiguous()}

    key = {"clip": clip.sha256, "num_frames": clip.num_frames, "vae": vae_hash, "dtype": str(vae.dtype)}
    key |= {"chunks": "whole"} if whole else {}  # which were not named before there was a choice
    found = cache.get("latents", key, compute)
    return found["mean"], found["std"]


@torch.no_grad()
def images_of(cache: Cache, clip: Clip, vae: Loaded[CausalVAE], vae_hash: str, num_draws: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the unscaled latents of a clip's first frame alone, [K, C, H, W] each, in fp32.

    It is encoded K = `num_draws` times with fresh noise on its pixels, as training shows images, or with 0 once without
    any. The noise follows from the clip, so that all runs share it.
    """

    def compute() -> dict[str, Tensor]:
        image = to_tensor(clip.read()[:1])[:, :, 0]
        if num_draws:
            generator = torch.Generator().manual_seed(int(clip.sha256[:15], 16))
            image = add_noise(image.expand(num_draws, -1, -1, -1), generator)
        each = list(posteriors(vae.model, image.to(next(vae.model.parameters()))))
        mean = torch.cat([posterior.mean for posterior in each])[:, :, 0].float()
        std = torch.cat([(0.5 * posterior.logvar).exp() for posterior in each])[:, :, 0].float()
        return {"mean": mean.cpu().contiguous(), "std": std.cpu().contiguous()}

    noise = [SIGMA_LOG_MEAN, SIGMA_LOG_STD, num_draws] if num_draws else None
    key = {"image": clip.sha256, "noise": noise, "vae": vae_hash, "dtype": str(vae.dtype)}
    found = cache.get("images", key, compute)
    return found["mean"], found["std"]


def embedding_of(cache: Cache, caption: str, text: Loaded[TextEncoder], text_hash: str, max_length: int) -> Tensor:
    """The embedding [L, D] of a caption, in fp32, by an encoder of at most `max_length` tokens."""
    key = {"caption": caption, "text": text_hash, "max_length": max_length, "dtype": str(text.dtype)}
    found = cache.get("text", key, lambda: {"text": text.model.encode([caption])[0].float().cpu().contiguous()})
    return found["text"]
