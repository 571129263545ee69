"""Train the embedded checkpoints from nothing: tokenizer, VAE, latents, transformer and text encoder.

From there `tiny-i2v` goes on with its attention, and `tiny` itself for some more steps at a low rate; feed-forward
layers, VAE and text encoder stay, so that the two share them.

    python -m cogvx.train.tiny            (or: make tiny)

Each stage resumes where it was stopped, so the command can be run again at any time. Hours on 2 cores: some six where
they have no bf16 instructions. The package's folders are written at the end.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..config import PRESETS
from ..data import shapes
from ..data.latents import SHARD, encode_ends, encode_shapes
from ..models.checkpoint import SHARED, STEMS, TINY, TINY_I2V, load_tensors, save_tensors
from ..models.saving import new_folder
from ..models.vae import CausalVAE
from ..pipeline import Pipeline
from ..settings import Configs
from . import transformer as transformer_training
from . import vae as vae_training
from .finetuning import check, check_seed
from .options import TrainingError, claim
from .tokenizer import build_tokenizer


@dataclass(frozen=True)
class TinyTraining:
    """Where the stages work, and on how much."""

    work: Path = Path("runs/tiny")  # the checkpoints are in its folders tiny and tiny-i2v
    num_clips: int = 6144  # encoded once for the transformer
    num_clips_i2v: int = 1856  # the first of them
    seed: int = 0
    share: float = 1.0  # of all steps: a thousandth, with 64 clips for both counts, tries everything in minutes
    embed: bool = True  # replace the package's checkpoints at the end

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check("share", self.share, self.share > 0, "above 0")
        clips, some = self.num_clips, self.num_clips_i2v
        check("num_clips", clips, clips > 0 and clips % SHARD == 0, f"a multiple of {SHARD}")
        legal = 0 < some <= clips and some % SHARD == 0
        check("num_clips_i2v", some, legal, f"a multiple of {SHARD}, at most num_clips, {clips}")
        whole = TinyTraining.share, TinyTraining.num_clips, TinyTraining.num_clips_i2v
        if self.embed and (self.share, self.num_clips, self.num_clips_i2v) != whole:
            given = f"share is {self.share}, num_clips {self.num_clips}, num_clips_i2v {self.num_clips_i2v}"
            raise TrainingError(f"embed is True, which takes all steps and clips, but {given}; give --no-embed")

    def steps(self, num_steps: int) -> int:
        return max(1, round(self.share * num_steps))


def train(run: TinyTraining) -> None:
    """All stages, and both checkpoints in fp16. Raises TrainingError where `work` holds a run of other options."""
    claim("work", run.work, "tiny", replace(run, work=TinyTraining.work, embed=False))
    first = train_first(run)
    refine(run, first)
    train_i2v(run, first)
    folders = [run.work / "tiny", run.work / "tiny-i2v"]
    if run.embed:
        with new_folder(TINY) as tiny, new_folder(TINY_I2V) as tiny_i2v:  # one is of no use beside an older other
            for folder, partial in zip(folders, (tiny, tiny_i2v), strict=True):
                shutil.copytree(folder, partial, dirs_exist_ok=True)
            leave_out_shared(tiny_i2v, tiny)
        folders = [TINY, TINY_I2V]
    for folder in folders:
        print(f"{folder}  {sum(file.stat().st_size for file in folder.rglob('*')) / 2**20:.1f} MiB")


def train_first(run: TinyTraining) -> Path:
    """Tokenizer, VAE, latents, and a transformer with its text encoder from nothing; the checkpoint's folder."""
    preset, words = PRESETS["tiny"], set(" ".join(scene.prompt for scene in shapes.ALL_SCENES).split())
    build_tokenizer(run.work / "tokenizer", words | {"small", "large"}, preset.transformer.max_text_seq_length)
    stages = (replace(stage, num_steps=run.steps(stage.num_steps)) for stage in vae_training.VAETraining.stages)
    vae = vae_training.train(vae_training.VAETraining(out=run.work / "vae", stages=tuple(stages), seed=run.seed))
    encode_shapes(vae, run.work / "latents", run.num_clips, run.seed)
    num_steps = run.steps(transformer_training.TransformerTraining.num_steps)
    model, text, scaling = transformer_training.train(
        transformer_training.TransformerTraining(
            latents=run.work / "latents", tokenizer=run.work / "tokenizer", out=run.work / "transformer",
            num_steps=num_steps, seed=run.seed,
        )
    )  # fmt: skip
    vae.config = replace(vae.config, scaling_factor=round(scaling, 6))
    for part in (model, vae, text.model):
        part.half()
    pipeline = Pipeline(model, vae, text, Configs(model.config, vae.config, preset.schedule))
    pipeline.save_pretrained(run.work / "first")
    return run.work / "first"


def refine(run: TinyTraining, first: Path) -> None:
    """The checkpoint in `first` once more, after some steps at a low rate that leave its feed-forward layers alone."""
    preset = PRESETS["tiny"]
    model, _, _ = transformer_training.train(
        transformer_training.TransformerTraining(
            latents=run.work / "latents", start_from=first, frozen=(".ff.",), out=run.work / "transformer-refined",
            config=preset.transformer, schedule=preset.schedule, num_steps=run.steps(450), muon_lr=0.002,
            adamw_lr=3e-4, num_warmup=20, num_decay=430, bf16=False, seed=run.seed + 7,
        )
    )  # fmt: skip
    with new_folder(run.work / "tiny") as partial:
        shutil.copytree(first, partial, dirs_exist_ok=True)
        model.half().save_pretrained(partial / "transformer")


def train_i2v(run: TinyTraining, first: Path) -> None:
    """The image-to-video variant of the checkpoint in `first`."""
    preset, vae = PRESETS["tiny-i2v"], CausalVAE.from_pretrained(first, dtype=torch.float32)
    encode_ends(vae, run.work / "ends", run.num_clips_i2v, run.seed)
    model, text, _ = transformer_training.train(
        transformer_training.TransformerTraining(
            latents=run.work / "latents", ends=run.work / "ends", start_from=first, frozen=(".ff.",),
            out=run.work / "transformer-i2v", config=preset.transformer, schedule=preset.schedule,
            num_steps=run.steps(4600), batch=16, muon_lr=0.0, adamw_lr=1e-3, num_warmup=10, num_decay=1900,
            bf16=False, seed=run.seed,
        )
    )  # fmt: skip
    pipeline = Pipeline(model.half(), vae.half(), text, Configs(model.config, vae.config, preset.schedule))
    pipeline.save_pretrained(run.work / "tiny-i2v")


def leave_out_shared(folder: Path, source: Path) -> None:
    """Take from a checkpoint's folder what the package reads from `source`'s: parts, and weights that are the same."""
    for part in SHARED:
        shutil.rmtree(folder / part)
    weights, others = (load_tensors(each / "transformer" / f"{STEMS[0]}.safetensors")[0] for each in (folder, source))
    own = {key: weight for key, weight in weights.items() if not torch.equal(weight, others[key])}
    file = folder / "transformer" / f"{STEMS[0]}.safetensors"
    save_tensors(own, file, {"format": "pt"})
    shutil.copymode(folder / "transformer" / "config.json", file)  # not for its owner alone


if __name__ == "__main__":
    import tyro

    train(tyro.cli(TinyTraining))
