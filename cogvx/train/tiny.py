"""Train the embedded checkpoint from nothing: tokenizer, VAE, latents, transformer and text encoder, folder.

    python -m cogvx.train.tiny            (or: make tiny)

Each stage resumes where it was stopped, so the command can be run again at any time. A few hours on 2 cores.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from ..config import PRESETS
from ..data import shapes
from ..data.latents import encode_shapes
from ..models.checkpoint import TINY
from ..pipeline import Pipeline
from ..settings import Configs
from . import transformer as transformer_training
from . import vae as vae_training
from .tokenizer import build_tokenizer


@dataclass(frozen=True)
class TinyTraining:
    """Where the stages work, and where the checkpoint goes."""

    work: Path = Path("runs/tiny")
    out: Path = TINY
    num_clips: int = 6144  # encoded once for the transformer
    seed: int = 0


def train(run: TinyTraining) -> None:
    """All stages, then the published folder in fp16."""
    preset, words = PRESETS["tiny"], set(" ".join(scene.prompt for scene in shapes.ALL_SCENES).split())
    build_tokenizer(run.work / "tokenizer", words | {"small", "large"}, preset.transformer.max_text_seq_length)
    vae = vae_training.train(vae_training.VAETraining(out=run.work / "vae", seed=run.seed))
    encode_shapes(vae, run.work / "latents", run.num_clips, run.seed)
    model, text, scaling = transformer_training.train(
        transformer_training.TransformerTraining(
            latents=run.work / "latents", tokenizer=run.work / "tokenizer", out=run.work / "transformer", seed=run.seed
        )
    )
    vae.config = replace(vae.config, scaling_factor=round(scaling, 6))
    for part in (model, vae, text.model):
        part.half()
    Pipeline(model, vae, text, Configs(model.config, vae.config, preset.schedule)).save_pretrained(run.out)
    print(f"{run.out}  {sum(file.stat().st_size for file in run.out.rglob('*')) / 2**20:.1f} MiB")


if __name__ == "__main__":
    import tyro

    train(tyro.cli(TinyTraining))
