"""The models of a checkpoint's folder, and of single files that take the place of one of them."""

import os
from pathlib import Path
from typing import Any

import torch

from .config import Published
from .machine import computable
from .models.checkpoint import CheckpointError
from .models.saving import new_folder, write_json
from .models.text import TextEncoder
from .models.transformer import ExpertTransformer
from .models.vae import CausalVAE
from .settings import Configs

MODEL_INDEX = {
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLCogVideoX"],
}


def load_part(
    part: type, folder: Path, file: str | os.PathLike | None, config: Published, dtype: Any, device: Any
) -> Any:
    """The transformer or VAE of a folder, or of a single file in its place."""
    beside = {} if file is None else {"config": config}
    return computable(part.from_pretrained(file or folder, dtype=dtype, device=device, **beside), dtype)


def dtype_on(
    device: torch.device, part: type, folder: Path, file: Any, config: Published, dtype: torch.dtype | None
) -> torch.dtype:
    """What a transformer or VAE will be computed in on a device; see `computable`."""
    stored = next(load_part(part, folder, file, config, dtype, "meta").parameters()).dtype
    return torch.float32 if dtype is None and stored == torch.float16 and device.type == "cpu" else stored


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


def save_parts(
    folder: str | os.PathLike,
    transformer: ExpertTransformer,
    vae: CausalVAE,
    text_encoder: TextEncoder,
    configs: Configs,
) -> None:
    """Write the published folder layout of a pipeline."""
    with new_folder(folder) as partial:
        transformer.save_pretrained(partial / "transformer")
        vae.save_pretrained(partial / "vae")
        text_encoder.save_pretrained(partial)
        (partial / "scheduler").mkdir()
        scheduler = configs.schedule.to_dict()
        write_json(partial / "scheduler" / "scheduler_config.json", scheduler)
        name = "CogVideoXImageToVideoPipeline" if configs.takes_image else "CogVideoXPipeline"
        index = {"_class_name": name, **MODEL_INDEX, "scheduler": ["diffusers", scheduler["_class_name"]]}
        write_json(partial / "model_index.json", index)
