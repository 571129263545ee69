"""The models of a checkpoint's folder, and of single files that take the place of one of them."""

import os
from pathlib import Path
from typing import Any

import torch

from .config import Published
from .machine import computable
from .models.checkpoint import CheckpointError
from .models.text import TextEncoder
from .models.transformer import ExpertTransformer
from .models.vae import CausalVAE
from .settings import Configs


def load_part(
    part: type, folder: Path, file: str | os.PathLike | None, config: Published, dtype: Any, device: Any
) -> Any:
    """The transformer or VAE of a folder, or of a single file in its place."""
    beside = {} if file is None else {"config": config}
    return computable(part.from_pretrained(file or folder, dtype=dtype, device=device, **beside), dtype)


def check_folder(folder: Path, configs: Configs, transformer: Any = None, vae: Any = None) -> None:
    """Raises CheckpointError if any part of a checkpoint lacks a tensor or has a wrong one; reads no weights.

    Where a file takes the place of the folder's transformer or VAE, that file is checked.
    """
    load_part(ExpertTransformer, folder, transformer, configs.transformer, torch.float32, "meta")
    load_part(CausalVAE, folder, vae, configs.vae, torch.float32, "meta")
    text_encoder = TextEncoder.from_pretrained(folder, configs.transformer.max_text_seq_length, device="meta")
    width = text_encoder.model.config.d_model
    if width != configs.transformer.text_embed_dim:
        wanted = configs.transformer.text_embed_dim
        raise CheckpointError(f"{folder}: the text encoder is {width} wide, the transformer takes {wanted}")
