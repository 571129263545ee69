"""Train the embedded checkpoints from nothing: tokenizer, VAE, latents, transformer and text encoder, folder.

The image-to-video variant goes on from the transformer, whose feed-forward layers stay, and shares all else.

    python -m cogvx.train.tiny            (or: make tiny)

Each stage resumes where it was stopped, so the command can be run again at any time. A few hours on 2 cores.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..config import PRESETS
from ..data import shapes
from ..data.latents import encode_ends, encode_shapes
from ..models.checkpoint import SHARED, STEMS, TINY, TINY_I2V, load_tensors, save_tensors
from ..models.vae import CausalVAE
from ..pipeline import Pipeline
from ..settings import Configs
from . import transformer as transformer_training
from . import vae as vae_training
from .tokenizer import build_tokenizer


@dataclass(frozen=True)
class TinyTraining:
    """Where the stages work, and where the checkpoints go."""

    work: Path = Path("runs/tiny")
    out: Path = TINY
    out_i2v: Path = TINY_I2V
    num_clips: int = 6144  # encoded once for the transformer
    num_clips_i2v: int = 1856  # the first of them
    seed: int = 0


def train(run: TinyTraining) -> None:
    """All stages, each followed by its published folder in fp16."""
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
    train_i2v(run)
    for folder in (run.out, run.out_i2v):
        print(f"{folder}  {sum(file.stat().st_size for file in folder.rglob('*')) / 2**20:.1f} MiB")


def train_i2v(run: TinyTraining) -> None:
    """The image-to-video variant of the checkpoint in `run.out`; its folder holds what the two do not share."""
    preset, vae = PRESETS["tiny-i2v"], CausalVAE.from_pretrained(run.out, dtype=torch.float32)
    encode_shapes(vae, run.work / "latents", run.num_clips_i2v, run.seed)
    encode_ends(vae, run.work / "ends", run.num_clips_i2v, run.seed)
    model, text, _ = transformer_training.train(
        transformer_training.TransformerTraining(
            latents=run.work / "latents", ends=run.work / "ends", start_from=run.out, layers=tuple(range(6)),
            frozen=(".ff.",), out=run.work / "transformer-i2v", config=preset.transformer, schedule=preset.schedule,
            num_steps=4600, batch=16, muon_lr=0.0, adamw_lr=1e-3, num_warmup=10, num_decay=1900, bf16=False,
            seed=run.seed,
        )
    )  # fmt: skip
    pipeline = Pipeline(model.half(), vae.half(), text, Configs(model.config, vae.config, preset.schedule))
    pipeline.save_pretrained(run.out_i2v)
    for part in SHARED:
        shutil.rmtree(run.out_i2v / part)
    leave_out_frozen(run.out_i2v / "transformer", run.out / "transformer")


def leave_out_frozen(folder: Path, source: Path) -> None:
    """Keep of a component's weights those that training changed, bit for bit."""
    name = f"{STEMS[0]}.safetensors"
    weights, frozen = load_tensors(folder / name)[0], load_tensors(source / name)[0]
    changed = {key: weight for key, weight in weights.items() if not torch.equal(weight, frozen[key])}
    save_tensors(changed, folder / name, {"format": "pt"})


if __name__ == "__main__":
    import tyro

    train(tyro.cli(TinyTraining))
