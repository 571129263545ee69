"""Train the expert transformer on latents of Shapes World: with a small T5 encoder beside it, or from another model.

    python -m cogvx.train.transformer --latents runs/latents --tokenizer runs/tokenizer --out runs/transformer

v-prediction on a schedule whose last step has zero SNR; 10 % of the prompts are dropped, half of them to zeros and half
to the embedding of the empty prompt, so that both conventions of the field work. Every step's data and noise follow
from (seed, step), so a stopped run resumes exactly where it was.

With `text_encoder` that checkpoint's encoder takes the prompts and stays as it is; with `start_from` so it is, and the
transformer begins with that checkpoint's layers.
A config with twice the input channels is shown the clip's first frame as well, and in a share of the samples its last.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Config, T5EncoderModel

from ..config import PRESETS, ScheduleConfig, TransformerConfig
from ..data.latents import load_shapes
from ..diffusion.loss import add_noise, draw_timesteps, velocity_loss
from ..diffusion.schedule import cumulative_alphas
from ..machine import multiplies_bf16
from ..models.image_latents import drop_image, in_frames, with_image
from ..models.text import TextEncoder, read_vocabulary
from ..models.transformer import ExpertTransformer
from ..settings import read_configs
from .checkpoint import restore, save_state
from .log import Log
from .optim import muon_adamw, warmup_hold_decay

# Where weights enter, leave and modulate; Muon takes the matrices of attention and MLPs.
ADAMW_NAMES = ("patch_embed", "proj_out", "time_embedding", "norm", "shared", "embed_tokens", "relative_attention_bias")


@dataclass(frozen=True)
class TransformerTraining:
    """Settings of a run; the defaults made what the embedded checkpoints go on from."""

    latents: Path = Path("runs/latents")
    tokenizer: Path = Path("runs/tokenizer")
    out: Path = Path("runs/transformer")
    num_steps: int = 3600
    batch: int = 64
    muon_lr: float = 0.01
    adamw_lr: float = 1e-3
    num_warmup: int = 100
    num_decay: int = 1100
    clip_norm: float = 1.0
    drop_text: float = 0.1
    save_every: int = 100
    bf16: bool | None = None  # in autocast; None is where the CPU has instructions for it
    seed: int = 0
    text_encoder: Path | None = None  # a published folder, whose text encoder and scaling of latents are kept
    start_from: Path | None = None  # one whose transformer is gone on from besides
    held_out: int = 0  # clips, the last ones, on which nothing is trained
    layers: tuple[int, ...] = ()  # of its transformer, those that this one begins with; none: all, in order
    ends: Path | None = None  # what `encode_ends` wrote, for a model that takes images; its clips alone are used
    drop_image: float = 0.05  # of the batches
    show_last: float = 0.25  # of the samples: the last frame beside the first
    frozen: tuple[str, ...] = ()  # the transformer's weights whose names hold one of these stay as they are
    config: TransformerConfig = PRESETS["tiny"].transformer
    schedule: ScheduleConfig = PRESETS["tiny"].schedule


def tiny_text_encoder(run: TransformerTraining) -> TextEncoder:
    """An untrained two-layer T5 v1.1 behind the run's tokenizer."""
    vocabulary, num_sentinels = read_vocabulary(run.tokenizer, run.tokenizer)
    width = run.config.text_embed_dim
    config = T5Config(
        vocab_size=len(vocabulary.pieces) + num_sentinels, d_model=width, d_kv=64, d_ff=2 * width, num_layers=2,
        num_heads=4, dropout_rate=0.0, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return TextEncoder(T5EncoderModel(config), vocabulary, num_sentinels, run.config.max_text_seq_length)


@dataclass
class Clips:
    """Encoded clips, and what a step draws from them."""

    mean: Tensor  # [clips, C, T, H, W]
    std: Tensor
    ends: tuple[Tensor, Tensor] | None  # mean and std of first and last frames, [clips, C, 2 draws, H, W]
    scaling: float

    def draw(self, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        """A sample of the clips' posteriors, [B, C, T, H, W]."""
        return self.scaling * _sample(self.mean[rows], self.std[rows], generator)

    def draw_image(self, rows: np.ndarray, run: TransformerTraining, generator: torch.Generator) -> Tensor:
        """The image latents of the same clips: first frames, some of the last ones, zeros between; or zeros alone."""
        draws = 2 * torch.randint(self.ends[0].shape[2] // 2, (len(rows),), generator=generator)
        first, last = (
            self.scaling * _sample(*(part[rows, :, draws + end, None] for part in self.ends), generator)
            for end in (0, 1)
        )
        shown = torch.rand(len(rows), generator=generator) < run.show_last
        last = torch.where(shown[:, None, None, None, None], last, 0.0)
        return drop_image(in_frames({0: first, -1: last}, self.mean.shape[2]), run.drop_image, generator)


def train(run: TransformerTraining) -> tuple[ExpertTransformer, TextEncoder, float]:
    """Train to the end, resuming from `run.out`; the model, its text encoder and the latents' scaling factor."""
    torch.manual_seed(run.seed)
    model, text, clips, prompts = prepare(run)
    tokens = text.tokenize(["", *prompts])  # row 0 is the empty prompt
    learning = nn.ModuleDict({"transformer": model})
    if (run.start_from or run.text_encoder) is None:
        learning["text_encoder"] = text.model
    for name, weight in model.named_parameters():
        weight.requires_grad_(not any(part in name for part in run.frozen))
    optimiser = muon_adamw(learning, run.muon_lr, run.adamw_lr, ADAMW_NAMES)
    parts = {**learning, "optimiser": optimiser}
    step = restore(run.out, parts)
    alphas = cumulative_alphas(run.schedule)
    bf16 = multiplies_bf16() if run.bf16 is None else run.bf16
    run.out.mkdir(parents=True, exist_ok=True)
    with Log(run.out / "log.jsonl", step) as log:
        while step < run.num_steps:
            start, generator = time.perf_counter(), torch.Generator().manual_seed(run.seed * 1_000_003 + step)
            rows = np.random.default_rng((run.seed, step)).integers(len(clips.mean), size=run.batch)
            clip = clips.draw(rows, generator)
            noise = torch.randn(clip.shape, generator=generator)
            timestep = draw_timesteps(run.batch, run.schedule.num_train_timesteps, generator)
            noisy = add_noise(clip, noise, alphas[timestep])
            if clips.ends is not None:
                noisy = with_image(noisy, clips.draw_image(rows, run, generator))
            # Written-out scores: on a CPU, at a hundred tokens, a seventh less time a step than flash attention.
            with torch.autocast("cpu", torch.bfloat16, bf16), sdpa_kernel(SDPBackend.MATH):
                embedded = embed(text.model, tokens, rows + 1, run.drop_text, generator)
                predicted = model(noisy, embedded, timestep)
            loss = velocity_loss(predicted, clip, noise, alphas[timestep]).mean()
            learning.zero_grad()
            loss.backward()
            gradient = torch.nn.utils.clip_grad_norm_(learning.parameters(), run.clip_norm, error_if_nonfinite=True)
            optimiser.step(warmup_hold_decay(step, run.num_steps, run.num_warmup, run.num_decay))
            step += 1
            row = {"step": step, "loss": loss.item(), "gradient": gradient.item()}
            log.write({**row, "seconds": time.perf_counter() - start})
            if step % run.save_every == 0 or step == run.num_steps:
                save_state(run.out, step, {name: part.state_dict() for name, part in parts.items()})
    return model, text, clips.scaling


def prepare(run: TransformerTraining) -> tuple[ExpertTransformer, TextEncoder, Clips, list[str]]:
    """What a run starts with: fresh weights or those of `run.start_from`, the encoded clips and their prompts."""
    mean, std, prompts = load_shapes(run.latents)
    model, ends = ExpertTransformer(run.config).init_for_training(), None
    if run.config.in_channels > mean.shape[1]:
        if run.ends is None:
            channels = f"{run.config.in_channels} input channels for {mean.shape[1]} of latents"
            raise ValueError(f"ends is None; with {channels} it must be a folder that encode_ends wrote")
        *ends, with_ends = load_shapes(run.ends)
        if with_ends != prompts[: len(with_ends)]:
            raise ValueError(f"ends is {str(run.ends)!r}, whose clips are not the first of {str(run.latents)!r}")
        mean, std, prompts = mean[: len(with_ends)], std[: len(with_ends)], with_ends
    if not 0 <= run.held_out < len(prompts):
        raise ValueError(f"held_out is {run.held_out}; it must be from 0 to below the {len(prompts)} clips")
    kept = slice(len(prompts) - run.held_out)
    mean, std, prompts = mean[kept], std[kept], prompts[kept]
    source = run.start_from or run.text_encoder
    if source is None:
        return model, tiny_text_encoder(run), Clips(mean, std, ends, 1.0 / float(mean.float().std())), prompts
    if run.start_from is not None:
        widen(model, ExpertTransformer.from_pretrained(run.start_from, dtype=torch.float32), run.layers)
    text, scaling = given_text(source, run.config)
    return model, text, Clips(mean, std, ends, scaling), prompts


def held_out(run: TransformerTraining) -> tuple[TextEncoder, Clips, list[str]]:
    """The clips that a run with a given text encoder keeps away from training, and that encoder."""
    mean, std, prompts = load_shapes(run.latents)
    text, scaling = given_text(run.start_from or run.text_encoder, run.config)
    kept = slice(len(prompts) - run.held_out, None)
    return text, Clips(mean[kept], std[kept], None, scaling), prompts[kept]


def given_text(folder: Path, config: TransformerConfig) -> tuple[TextEncoder, float]:
    """A published folder's text encoder, frozen, and its scaling of latents."""
    text = TextEncoder.from_pretrained(folder, config.max_text_seq_length, torch.float32)
    text.model.requires_grad_(False)
    return text, read_configs(folder).vae.scaling_factor


@torch.no_grad()
def widen(model: ExpertTransformer, source: ExpertTransformer, layers: tuple[int, ...], share: float = 0.3) -> None:
    """Give a model another one's weights: those of some of its layers, and for an image a share of the latents'.

    An image's latents look as a clip's do, so a model that takes them for a part of the clip learns faster than one
    that begins with zeros for them. Without `layers` it takes all. Raises ValueError for others than the model has
    room for.
    """
    weights, there = source.state_dict(), len(source.transformer_blocks)
    layers, wanted = layers or tuple(range(there)), len(model.transformer_blocks)
    if len(layers) != wanted or not all(0 <= layer < there for layer in layers):
        raise ValueError(f"layers is {layers}; it must name {wanted} of 0 to {there - 1}, those of start_from's model")
    for name, weight in model.state_dict().items():
        if name.startswith("transformer_blocks."):
            _, layer, rest = name.split(".", 2)
            name = f"transformer_blocks.{layers[int(layer)]}.{rest}"
        given = weights[name]
        if given.shape == weight.shape:
            weight.copy_(given)
        else:  # the patch embedding, [D, channels, p, p]
            weight.copy_(torch.cat([given, share * given], dim=1))


def embed(encoder: T5EncoderModel, tokens: Tensor, rows: np.ndarray, drop: float, generator: torch.Generator) -> Tensor:
    """Embeddings [B, L, D] of the rows' prompts; a share `drop` of them becomes no text, in one of two conventions."""
    chance = torch.rand(len(rows), generator=generator)
    rows = torch.where(chance < drop / 2, 0, torch.from_numpy(rows))  # the empty prompt
    text = encoder(tokens[rows]).last_hidden_state
    return torch.where(((chance >= drop / 2) & (chance < drop))[:, None, None], 0.0, text)  # zeros


def _sample(mean: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
    return mean.float() + std.float() * torch.randn(mean.shape, generator=generator)


if __name__ == "__main__":
    import tyro

    train(tyro.cli(TransformerTraining))
