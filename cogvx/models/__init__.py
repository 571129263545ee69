"""The networks, by their published names: transformer, VAE, text encoder (in `cogvx.models.text`)."""

from .checkpoint import CheckpointError
from .transformer import ExpertTransformer
from .vae import CausalVAE

__all__ = ["CausalVAE", "CheckpointError", "ExpertTransformer"]
