"""What was loaded from beside a pipeline's folder, as the metadata of its videos says it."""

from typing import Any

from torch import nn

from .lora import described


def files_beside(transformer: nn.Module, vae: nn.Module) -> dict[str, Any]:
    """Path and SHA-256 of single files and LoRAs that a pipeline computes with; each is hashed once."""
    files = {"transformer_file": transformer, "vae_file": vae}
    single = {name: model.file for name, model in files.items() if getattr(model, "file", None) is not None}
    found: dict[str, Any] = {n: {"file": str(file.path), "sha256": file.sha256} for n, file in single.items()}
    return found | ({"loras": described(transformer)} if transformer.loras else {})
