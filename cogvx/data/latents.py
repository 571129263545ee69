"""Latents of Shapes World clips on disk, encoded once and read in every epoch."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..models.checkpoint import save_tensors
from ..models.image_latents import add_noise
from ..models.vae import CausalVAE, Posterior
from . import shapes
from .pixels import to_tensor

SHARD = 64  # clips a file


def encode_shapes(vae: CausalVAE, folder: Path, num_clips: int, seed: int) -> None:
    """Write the posteriors of `num_clips` training clips and their prompts; shards that are there already are kept."""
    for path, scenes, rng in _missing_shards(folder, num_clips, seed):
        video = np.stack([shapes.render(scene, rng) for scene in scenes])
        with torch.inference_mode():
            posteriors = [vae.encode(clip) for clip in to_tensor(video).split(8)]
        _write(path, scenes, posteriors)


def encode_ends(vae: CausalVAE, folder: Path, num_clips: int, seed: int, num_draws: int = 2) -> None:
    """Write the posteriors of the first and the last frame of the clips of `encode_shapes`, each encoded alone.

    Each has `num_draws` times fresh noise on its pixels, as an image has in training: the frames of a clip follow one
    another as first, last, first, last, ...
    """
    for path, scenes, rng in _missing_shards(folder, num_clips, seed):
        ends = np.stack([shapes.render(scene, rng)[[0, -1]] for scene in scenes])  # [clips, 2, H, W, 3]
        images = to_tensor(ends).transpose(1, 2).repeat(1, num_draws, 1, 1, 1)  # [clips, 2 draws, 3, H, W]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        posteriors = []
        with torch.inference_mode():
            for clip in images:
                alone = vae.encode(add_noise(clip, generator).unsqueeze(2))  # [2 draws, C, 1, H, W]
                posteriors.append(Posterior(alone.mean.transpose(0, 2), alone.raw_logvar.transpose(0, 2)))
        _write(path, scenes, posteriors)


def _missing_shards(folder: Path, num_clips: int, seed: int) -> Iterator[tuple[Path, list, np.random.Generator]]:
    """File, scenes and the generator that renders them, of every shard that is not there yet."""
    if num_clips < 1 or num_clips % SHARD:
        raise ValueError(f"num_clips is {num_clips}; it must be a multiple of {SHARD}, as many as a file holds")
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_clips // SHARD):
        path = folder / f"{shard:05d}.safetensors"
        if not path.exists():
            rng = np.random.default_rng((seed, shard))
            yield path, [shapes.sample_scene(rng) for _ in range(SHARD)], rng


def _write(path: Path, scenes: list[shapes.Scene], posteriors: list[Posterior]) -> None:
    mean = torch.cat([p.mean for p in posteriors]).half()
    std = torch.cat([(0.5 * p.logvar).exp() for p in posteriors]).half()
    save_tensors({"mean": mean, "std": std}, path, {"prompts": json.dumps([scene.prompt for scene in scenes])})


def load_shapes(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Means and standard deviations [clips, C, T, H, W] in fp16, and prompts. Raises ValueError if there are none."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"folder is {str(folder)!r}, which holds no encoded clips")
    prompts = []
    for path in paths:
        with safe_open(path, "pt") as file:
            prompts += json.loads(file.metadata()["prompts"])
    shards = [load_file(path) for path in paths]
    return torch.cat([s["mean"] for s in shards]), torch.cat([s["std"] for s in shards]), prompts
