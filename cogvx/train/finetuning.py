"""The options of a run on a folder of clips, and what is made of them before its first step."""

import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..data.cache import Cache, Loaded, embedding_of, images_of, latents_of
from ..data.clips import Clip
from ..data.packing import num_tokens
from ..machine import pick_device
from ..memory.choose import amount
from ..models.checkpoint import component_folder, resolve_folder
from ..models.choices import image_scaling, last_norm_eps, num_text_tokens, placement
from ..models.saving import content_hash
from ..models.text import TextEncoder
from ..models.transformer import ExpertTransformer
from ..models.vae import CausalVAE
from ..numerics import read_numerics
from ..settings import Configs, read_configs
from .lora import ATTENTION, targeted
from .options import TrainingError
from .sampling import Draws, Example


@dataclass(frozen=True)
class Optimiser:
    """AdamW, and a learning rate that rises linearly and falls as a cosine."""

    lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    num_warmup: int = 100
    least: float = 0.0  # share of lr at the end
    bits: Literal[8, 32] = 32  # of each of the two moments of a number that learns; 8 with torchao


@dataclass(frozen=True)
class LoRAOptions:
    rank: int = 128
    alpha: float = 64.0
    targets: tuple[str, ...] = ATTENTION  # ends of the names of layers


@dataclass(frozen=True)
class Finetuning:
    """A run on a folder of clips with captions."""

    data: Path
    out: Path
    model: str = "tiny"  # a checkpoint folder, a hub name, or "tiny"
    kind: Literal["transformer", "lora"] = "lora"
    task: Literal["text_to_video", "image_to_video"] | None = None  # None is what the model is made for
    numerics: str = "sat"  # what the clips are to be made with: sat, diffusers, or either with changes
    start: Literal["checkpoint", "scratch"] = "checkpoint"  # of the transformer; VAE and text encoder are the model's
    cache: Path | None = None  # of latents and embeddings; None is `out`/cache
    # Of clips, whatever the numerics say, whose "whole" takes three times the memory and is asked for here.
    vae_encode_chunks: Literal["whole", "8_frames"] = "8_frames"
    num_frames: int | None = None  # 8N+1 from the start of each clip; None is as many as each has
    on_fault: Literal["stop", "skip"] = "stop"  # clips that cannot be trained on
    num_steps: int = 1000
    batch: int = 1  # samples that are computed at once, packed into one sequence
    accumulation: int = 1  # such batches a step, of all processes together
    pack_tokens: int | None = None  # of a sequence, at most: a step's samples then share as few as hold them
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    checkpointing: bool = False  # of activations: a third more time, far less memory
    shard: int = 1  # so many processes hold weights, gradients, average and states between them; 0: all of them
    workers: int = 0  # processes that read and draw the next steps' samples while the model computes
    drop_text: float = 0.1
    null_text: Literal["zeros", "encoded"] | None = None  # what a dropped caption becomes; None: as numerics say
    drop_image: float = 0.05  # of the samples of a model that takes an image: each clip's first frame
    image_draws: int = 4  # how often it is encoded, each time with other noise on its pixels; 0: once, without noise
    ema_decay: float | None = None
    non_finite: Literal["stop", "skip"] = "stop"
    save_every: int = 100
    keep_last: int = 2  # states
    keep_best: int = 0  # more of them: those before which the mean loss was lowest
    tensorboard: bool = False  # what log.jsonl holds, in `out`/tensorboard too
    seed: int = 0
    device: str | None = None
    optimiser: Optimiser = field(default_factory=Optimiser)
    lora: LoRAOptions = field(default_factory=LoRAOptions)

    def __post_init__(self) -> None:
        check_loop(self, "num_steps", "batch", "accumulation", "save_every", "keep_last")
        check("keep_best", self.keep_best, self.keep_best >= 0, "at least 0")
        check("pack_tokens", self.pack_tokens, self.pack_tokens is None or self.pack_tokens >= 1, "at least 1")
        frames = self.num_frames
        check("num_frames", frames, frames is None or (frames >= 1 and frames % 8 == 1), "8N+1, from 1 on")
        check("drop_text", self.drop_text, 0 <= self.drop_text <= 1, "from 0 to 1")
        check("drop_image", self.drop_image, 0 <= self.drop_image <= 1, "from 0 to 1")
        check("image_draws", self.image_draws, self.image_draws >= 0, "at least 0")
        check("lora.rank", self.lora.rank, self.lora.rank >= 1, "at least 1")
        check("lora.alpha", self.lora.alpha, self.lora.alpha > 0, "above 0")
        check("lora.targets", list(self.lora.targets), len(self.lora.targets) > 0, "at least one end of layers' names")
        check("shard", self.shard, self.shard >= 0, "at least 0")
        check("shard", self.shard, self.shard == 1 or self.kind == "transformer", "1 for a LoRA, which is not sharded")
        # What overflows in fp16 is computed again, by the process whose sample it is in alone: it would wait for ever.
        check("shard", self.shard, self.shard == 1 or self.precision != "fp16", "1 in fp16, which is not sharded")
        bits = self.optimiser.bits
        check("optimiser.bits", bits, bits == 32 or self.shard == 1, "32 where processes share the weights out")
        read_numerics(self.numerics)
        check("start", self.start, self.kind == "transformer" or self.start == "checkpoint", "checkpoint for a LoRA")


def check_loop(run: Any, *counts: str) -> None:
    """What the options of every run have in common: counts from 1, the seed, the optimiser, the average."""
    for name in counts:
        check(name, getattr(run, name), getattr(run, name) >= 1, "at least 1")
    check_seed(run.seed)
    check("workers", run.workers, run.workers >= 0, "at least 0")
    check("ema_decay", run.ema_decay, run.ema_decay is None or 0 <= run.ema_decay < 1, "from 0 to below 1")
    rates = run.optimiser
    for name in ("lr", "eps", "clip_norm"):
        check(f"optimiser.{name}", getattr(rates, name), getattr(rates, name) > 0, "above 0")
    fit = len(rates.betas) == 2 and all(0 <= beta < 1 for beta in rates.betas)
    check("optimiser.betas", rates.betas, fit, "two numbers, each from 0 to below 1")
    for name in ("weight_decay", "num_warmup"):
        check(f"optimiser.{name}", getattr(rates, name), getattr(rates, name) >= 0, "at least 0")
    check("optimiser.least", rates.least, 0 <= rates.least <= 1, "from 0 to 1, a share of optimiser.lr")
    for name, is_asked, package in (("optimiser.bits is 8", rates.bits == 8, "torchao"),
                                    ("tensorboard is true", run.tensorboard, "tensorboard")):  # fmt: skip
        if is_asked and find_spec(package) is None:
            raise TrainingError(f"{name}, which needs {package}; pip install 'cogvx[train]' has it")


def long_warmup(run: Any) -> str | None:
    """What to say of a run that ends before its learning rate is at its height; None of any other."""
    warmup, steps = run.optimiser.num_warmup, run.num_steps
    if warmup < steps:
        return None
    return f"optimiser.num_warmup is {warmup}, num_steps {steps}: the learning rate rises to the end"


def check_seed(seed: int) -> None:
    """NumPy takes none below 0, torch's generators 64 bits: a million times the seed, plus the step, must fit."""
    check("seed", seed, 0 <= seed < 2**32, f"from 0 to {2**32 - 1}")


def check(name: str, value: object, is_valid: bool, wanted: str) -> None:
    if not is_valid:
        raise TrainingError(f"{name} is {value}; it must be {wanted}")


def configs_of(run: Finetuning) -> Configs:
    """The model's configs. Raises TrainingError for a model that is made for another task than the run's."""
    configs = read_configs(run.model)
    made_for = "image_to_video" if configs.takes_image else "text_to_video"
    if run.task not in (None, made_for):
        channels = f"{configs.transformer.in_channels} input channels for {configs.vae.latent_channels} of latents"
        raise TrainingError(f"task is {run.task!r}; model {run.model!r} has {channels}, it is made for {made_for!r}")
    return configs


def unit_of(configs: Configs) -> tuple[int, int]:
    """What height and width of a clip must be multiples of, in pixels."""
    return tuple(configs.space_factor * patch for patch in configs.transformer.patch[1:])


def latent_size(configs: Configs, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Frames, height and width of a clip's latents as the transformer takes them: its patches in time are filled."""
    frames, patch = (num_frames - 1) // configs.time_factor + 1, configs.transformer.patch[0]
    return -(-frames // patch) * patch, height // configs.space_factor, width // configs.space_factor


def load_transformer(run: Finetuning, configs: Configs) -> ExpertTransformer:
    """The transformer to train, on the host: fp32, or bf16 under a LoRA where that is the precision.

    Raises TrainingError for layers that it does not have.
    """
    eps = last_norm_eps(configs.transformer, read_numerics(run.numerics))
    if run.start == "scratch":
        torch.manual_seed(run.seed)
        model = ExpertTransformer(configs.transformer).init_for_training()
    else:
        model = ExpertTransformer.from_pretrained(run.model, dtype=weight_dtype(run), device="cpu")
    model.norm_out.norm.eps = eps
    if run.kind == "lora":
        targeted(model, run.lora.targets)  # before anything is computed
    return model


def base_hash(run: Finetuning) -> str | None:
    """SHA-256 of the checkpoint that a LoRA is trained for; None where nothing stands still."""
    return content_hash(component_folder(resolve_folder(run.model), "transformer")) if run.kind == "lora" else None


def weight_dtype(run: Finetuning) -> torch.dtype:
    """In which the transformer's own weights are held."""
    return torch.bfloat16 if run.kind == "lora" and run.precision == "bf16" else torch.float32


def examples_of(run: Finetuning, clips: list[Clip], configs: Configs) -> tuple[list[Example], Draws]:
    """Latents and embeddings of the clips, computed where they are not on disk yet, and how they are drawn.

    VAE and text encoder are loaded one after the other, each only where something is to be computed.
    """
    root, device = resolve_folder(run.model), pick_device(run.device)
    cache = Cache(run.cache or run.out / "cache")
    hashes = {name: content_hash(component_folder(root, name)) for name in ("vae", "text_encoder", "tokenizer")}
    vae = Loaded(lambda: CausalVAE.from_pretrained(run.model, dtype=torch.float32, device=device), torch.float32)
    latents = [latents_of(cache, clip, vae, hashes["vae"], run.vae_encode_chunks == "whole") for clip in clips]
    images = [images_of(cache, clip, vae, hashes["vae"], run.image_draws) if configs.takes_image else None
              for clip in clips]  # fmt: skip
    vae.free()
    numerics = read_numerics(run.numerics)
    length = num_text_tokens(configs.transformer, numerics)
    text = Loaded(lambda: TextEncoder.from_pretrained(run.model, length, torch.float32, device), torch.float32)
    known = text, hashes["text_encoder"] + hashes["tokenizer"], length
    embeddings = {caption: embedding_of(cache, caption, *known) for caption in {c.caption for c in clips}}
    null: Tensor = embedding_of(cache, "", *known)
    null = torch.zeros_like(null) if (run.null_text or numerics.null_text) == "zeros" else null
    examples = [Example(*pair, embeddings[clip.caption], image)
                for pair, clip, image in zip(latents, clips, images, strict=True)]  # fmt: skip
    how = configs.transformer, configs.schedule, configs.vae.scaling_factor, null, run.drop_text, run.seed
    return examples, Draws(*how, image_scaling(configs.vae, numerics), run.drop_image)


def tokens_of(run: Finetuning, clips: list[Clip], configs: Configs) -> list[int]:
    """How many tokens each clip has.

    Raises TrainingError where a sequence is to hold fewer, and NumericsError for a clip that the run's numerics have no
    positions for.
    """
    config, numerics, tokens = configs.transformer, read_numerics(run.numerics), []
    num_text = num_text_tokens(config, numerics)
    for clip in clips:
        size = latent_size(configs, clip.num_frames, clip.height, clip.width)
        placement(config, numerics, size)
        tokens.append(num_tokens(config, size, num_text))
    check("pack_tokens", run.pack_tokens, run.pack_tokens is None or max(tokens) <= run.pack_tokens,
          f"at least {max(tokens)}, as many as the longest clip has")  # fmt: skip
    return tokens


def describe(
    run: Finetuning, clips: list[Clip], configs: Configs, learning: int, weights: int, sharing: int = 1
) -> str:
    """What a run is going to do, and the memory that weights, gradients and optimiser take.

    learning, weights: how many numbers learn, and how many bytes the model has. sharing: processes that hold them
    between them.
    """
    tokens, task = tokens_of(run, clips, configs), "image to video" if configs.takes_image else "text to video"
    per_step = run.batch * run.accumulation
    # Gradient and average in fp32, and two moments of the optimiser.
    states = learning * (4 + 2 * run.optimiser.bits // 8 + 4 * (run.ema_decay is not None))
    return "\n".join([
        f"{len(clips)} clips of {min(tokens)} to {max(tokens)} tokens, {sum(tokens) / len(tokens):.0f} in the mean",
        f"{run.num_steps} steps of {per_step} samples: {run.num_steps * per_step / len(clips):.1f} epochs",
        f"{learning:,} of the model's numbers learn ({run.kind}, {task})",
        f"{amount(weights / sharing)} of weights, {amount(states / sharing)} of gradients and states, "
        "activations besides" + f", in each of {sharing} processes" * (sharing > 1),
        f"{math.ceil(run.num_steps / run.save_every)} states are saved to {run.out}, the last {run.keep_last} kept",
    ])  # fmt: skip
