"""Latents of Shapes World clips on disk, encoded once and read in every epoch."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..models.vae import CausalVAE
from . import shapes
from .pixels import to_tensor

SHARD = 64  # clips a file


def encode_shapes(vae: CausalVAE, folder: Path, num_clips: int, seed: int) -> None:
    """Write the posteriors of `num_clips` training clips and their prompts; shards that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(-(-num_clips // SHARD)):
        path = folder / f"{shard:05d}.safetensors"
        if path.exists():
            continue
        rng = np.random.default_rng((seed, shard))
        scenes = [shapes.sample_scene(rng) for _ in range(SHARD)]
        video = np.stack([shapes.render(scene, rng) for scene in scenes])
        with torch.inference_mode():
            posteriors = [vae.encode(clip) for clip in to_tensor(video).split(8)]
            mean = torch.cat([p.mean for p in posteriors]).half()
            std = torch.cat([(0.5 * p.logvar).exp() for p in posteriors]).half()
        partial = path.with_suffix(".partial")
        prompts = json.dumps([scene.prompt for scene in scenes])
        save_file({"mean": mean, "std": std}, partial, metadata={"prompts": prompts})
        os.replace(partial, path)


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
