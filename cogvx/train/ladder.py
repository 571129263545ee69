"""A ladder of transformers on one data set: each size for each number of steps, and the law that their losses follow.

    cogvx train ladder out=runs/ladder

The largest rung is trained last, after its loss was predicted from all others and the prediction was written down.
A stopped ladder goes on with the same command: rungs that are done are read, one that is under way resumes.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..config import PRESETS, TransformerConfig
from ..data.latents import SHARD, encode_shapes
from ..diffusion.loss import add_noise, velocity_loss
from ..diffusion.schedule import cumulative_alphas
from ..models.checkpoint import TINY
from ..models.on_disk import replacing
from ..models.transformer import ExpertTransformer
from ..models.vae import CausalVAE
from . import transformer as training
from .finetuning import check, check_seed
from .options import TrainingError, claim
from .scaling import NUM_RUNGS, Rung, predicted

_HEAD = 16  # channels of an attention head
_AT_ONCE = 64  # clips that are measured together


@dataclass(frozen=True)
class Ladder:
    """A family of sizes, and how long each of them is trained."""

    out: Path
    latents: Path | None = None  # encoded clips and their prompts; None is `out`/latents, made of Shapes World
    num_clips: int = 1856  # of Shapes World, where they are made
    held_out: int = 256  # the last ones, which no rung is trained on; the text encoder was, with their like
    text_encoder: Path = TINY  # a published folder
    widths: tuple[int, ...] = (32, 48, 64, 96, 128)
    layers: tuple[int, ...] = (2, 2, 3, 3, 4)  # of each width
    steps: tuple[int, ...] = (100, 316, 1000)
    batch: int = 16
    lr: float = 3e-3  # at a width of 64; the others have it times sqrt(64 / width)
    draws: int = 4  # timesteps at which each held-out clip is measured
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.layers) or len(self.widths) < 2:
            raise TrainingError(f"layers is {list(self.layers)}; there must be one for each of {len(self.widths)} "
                                f"widths, and at least two")  # fmt: skip
        if any(width % _HEAD or width < _HEAD for width in self.widths):
            raise TrainingError(f"widths is {list(self.widths)}; every one must be a multiple of {_HEAD}")
        for name in ("layers", "steps"):
            if min(getattr(self, name), default=0) < 1:
                raise TrainingError(f"{name} is {list(getattr(self, name))}; every one must be at least 1")
        if len(self.widths) * len(self.steps) <= NUM_RUNGS:
            made = f"{len(self.widths)} widths and {len(self.steps)} steps make too few rungs"
            raise TrainingError(f"{made}; a law takes {NUM_RUNGS} besides the largest")
        for name in ("batch", "draws", "held_out"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        check("lr", self.lr, self.lr > 0, "above 0")
        check_seed(self.seed)
        # The same rung twice would be found when all others are trained: a folder holds one.
        sizes = list(zip(self.widths, self.layers, strict=True))
        check("widths", list(self.widths), len(set(sizes)) == len(sizes), "each another, or with other layers")
        check("steps", list(self.steps), len(set(self.steps)) == len(self.steps), "each another number")
        if self.latents is None:  # else the clips are there, and are counted when they are read
            clips, even = self.num_clips, self.num_clips >= 1 and self.num_clips % SHARD == 0
            check("num_clips", clips, even, f"a multiple of {SHARD}, as many as a file holds")
            check("held_out", self.held_out, self.held_out < clips, f"below num_clips, {clips}")

    def rungs(self) -> list[tuple[TransformerConfig, int]]:
        """Config and steps of each, the one that takes most compute last."""
        every = [
            (replace(PRESETS["tiny"].transformer, num_attention_heads=width // _HEAD, attention_head_dim=_HEAD,
                     num_layers=layers), steps)
            for width, layers in zip(self.widths, self.layers, strict=True) for steps in self.steps
        ]  # fmt: skip
        return sorted(every, key=lambda rung: flops_of(rung[0], rung[1] * self.batch))


def climb(run: Ladder) -> dict:
    """Train all rungs; what was predicted of the largest before it was trained, and the rungs, also in `out`."""
    claim("out", run.out, "ladder", run)
    latents = run.latents or run.out / "latents"
    if run.latents is None:
        encode_shapes(CausalVAE.from_pretrained(TINY, dtype=torch.float32), latents, run.num_clips, run.seed)
    *others, (config, steps) = run.rungs()
    found = [climbed(run, latents, *rung) for rung in others]
    prediction = run.out / "prediction.json"
    if not prediction.exists():
        if folder_of(run, config, steps).exists():
            raise TrainingError(f"{folder_of(run, config, steps)} was trained before its loss was predicted; remove it")
        weights, tokens = weights_of(config), steps * run.batch * tokens_of(config)
        loss, between = predicted(found, weights, tokens)
        write_json(prediction, {"weights": weights, "tokens": tokens, "loss": loss, "interval": between})
    found.append(climbed(run, latents, config, steps))
    result = {"rungs": [asdict(rung) for rung in found], "largest, predicted": json.loads(prediction.read_text())}
    write_json(run.out / "ladder.json", result)
    return result


def folder_of(run: Ladder, config: TransformerConfig, steps: int) -> Path:
    return run.out / f"{config.width}x{config.num_layers}-{steps}"


def climbed(run: Ladder, latents: Path, config: TransformerConfig, steps: int) -> Rung:
    """One rung, trained unless its result is there already."""
    out = folder_of(run, config, steps)
    result = out / "result.json"
    if not result.exists():
        settings = training.TransformerTraining(
            latents=latents, out=out, num_steps=steps, batch=run.batch, muon_lr=0.0,
            adamw_lr=run.lr * (64 / config.width) ** 0.5, num_warmup=max(1, steps // 20), num_decay=max(1, steps // 2),
            bf16=False, seed=run.seed, text_encoder=run.text_encoder, held_out=run.held_out, config=config,
        )  # fmt: skip
        model, *_ = training.train(settings)
        samples = steps * run.batch
        rung = Rung(weights_of(config), samples * tokens_of(config), flops_of(config, samples),
                    held_out_loss(model, settings, run.draws))  # fmt: skip
        write_json(result, asdict(rung))
    return Rung(**json.loads(result.read_text()))


@torch.inference_mode()
def held_out_loss(model: ExpertTransformer, run: training.TransformerTraining, draws: int) -> float:
    """The mean loss of the clips that a run keeps away from training, each at timesteps spread over the schedule."""
    text, clips, prompts = training.held_out(run)
    alphas, generator = cumulative_alphas(run.schedule), torch.Generator().manual_seed(run.seed)
    total, most = 0.0, run.schedule.num_train_timesteps
    for draw in range(draws):
        noise = torch.randn(clips.mean.shape, generator=generator)
        # Clip i of n is at the share (i + draw / draws) / n of the schedule: all of it is met evenly in every draw.
        share = (torch.arange(len(prompts)) + draw / draws) / len(prompts)
        timesteps = (share * most).long()[torch.randperm(len(prompts), generator=generator)]
        for first in range(0, len(prompts), _AT_ONCE):
            rows = slice(first, first + _AT_ONCE)
            clip, alpha = clips.scaling * clips.mean[rows].float(), alphas[timesteps[rows]]
            embedded = text.encode(prompts[rows])
            output = model(add_noise(clip, noise[rows], alpha), embedded, timesteps[rows])
            total += float(velocity_loss(output, clip, noise[rows], alpha).sum())
    return total / (draws * len(prompts))


def weights_of(config: TransformerConfig) -> int:
    """Weights of the blocks' products with every token: attention and MLP."""
    return 12 * config.num_layers * config.width**2


def tokens_of(config: TransformerConfig) -> int:
    """Tokens of a clip and its text."""
    return math.prod(config.trained_grid) + config.max_text_seq_length


def flops_of(config: TransformerConfig, samples: int) -> float:
    """Floating-point operations of training on so many clips: 6 a weight and token, and the products of attention."""
    tokens = tokens_of(config)
    return float(samples * tokens * (6 * weights_of(config) + 12 * config.num_layers * config.width * tokens))


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
