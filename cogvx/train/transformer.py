"""Train the expert transformer and a small T5 encoder beside it, on latents of Shapes World.

    python -m cogvx.train.transformer --latents runs/latents --tokenizer runs/tokenizer --out runs/transformer

v-prediction on a schedule whose last step has zero SNR; 10 % of the prompts are dropped, half of them to zeros and half
to the embedding of the empty prompt, so that both conventions of the field work. Every step's data and noise follow
from (seed, step), so a stopped run resumes exactly where it was.
"""

import json
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
from ..models.text import TextEncoder, read_vocabulary
from ..models.transformer import ExpertTransformer
from .checkpoint import restore, save_state
from .optim import muon_adamw, warmup_hold_decay

# Where weights enter, leave and modulate; Muon takes the matrices of attention and MLPs.
ADAMW_NAMES = ("patch_embed", "proj_out", "time_embedding", "norm", "shared", "embed_tokens", "relative_attention_bias")


@dataclass(frozen=True)
class TransformerTraining:
    """Settings of a run; the defaults made the embedded checkpoint."""

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
    seed: int = 0
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


def train(run: TransformerTraining) -> tuple[ExpertTransformer, TextEncoder, float]:
    """Train to the end, resuming from `run.out`; the model, its text encoder and the latents' scaling factor."""
    torch.manual_seed(run.seed)
    mean, std, prompts = load_shapes(run.latents)
    scaling = 1.0 / float(mean.float().std())
    model, text = ExpertTransformer(run.config).init_for_training(), tiny_text_encoder(run)
    tokens = text.tokenize(["", *prompts])  # row 0 is the empty prompt
    both = nn.ModuleList([model, text.model])
    optimiser = muon_adamw(both, run.muon_lr, run.adamw_lr, ADAMW_NAMES)
    parts = {"transformer": model, "text_encoder": text.model, "optimiser": optimiser}
    step = restore(run.out, parts)
    alphas = cumulative_alphas(run.schedule)
    run.out.mkdir(parents=True, exist_ok=True)
    with (run.out / "log.jsonl").open("a") as log:
        while step < run.num_steps:
            start, generator = time.perf_counter(), torch.Generator().manual_seed(run.seed * 1_000_003 + step)
            rows = np.random.default_rng((run.seed, step)).integers(len(mean), size=run.batch)
            clip = mean[rows].float() + std[rows].float() * torch.randn(mean[rows].shape, generator=generator)
            clip, noise = scaling * clip, torch.randn(clip.shape, generator=generator)
            timestep = draw_timesteps(run.batch, run.schedule.num_train_timesteps, generator)
            # Written-out scores: on a CPU, at a hundred tokens, a seventh less time a step than flash attention.
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                embedded = embed(text.model, tokens, rows + 1, run.drop_text, generator)
                predicted = model(add_noise(clip, noise, alphas[timestep]), embedded, timestep)
            loss = velocity_loss(predicted, clip, noise, alphas[timestep]).mean()
            both.zero_grad()
            loss.backward()
            gradient = torch.nn.utils.clip_grad_norm_(both.parameters(), run.clip_norm, error_if_nonfinite=True)
            optimiser.step(warmup_hold_decay(step, run.num_steps, run.num_warmup, run.num_decay))
            step += 1
            row = {"step": step, "loss": loss.item(), "gradient": gradient.item()}
            log.write(json.dumps({**row, "seconds": time.perf_counter() - start}) + "\n")
            log.flush()
            if step % run.save_every == 0 or step == run.num_steps:
                save_state(run.out, step, {name: part.state_dict() for name, part in parts.items()})
    return model, text, scaling


def embed(encoder: T5EncoderModel, tokens: Tensor, rows: np.ndarray, drop: float, generator: torch.Generator) -> Tensor:
    """Embeddings [B, L, D] of the rows' prompts; a share `drop` of them becomes no text, in one of two conventions."""
    chance = torch.rand(len(rows), generator=generator)
    rows = torch.where(chance < drop / 2, 0, torch.from_numpy(rows))  # the empty prompt
    text = encoder(tokens[rows]).last_hidden_state
    return torch.where(((chance >= drop / 2) & (chance < drop))[:, None, None], 0.0, text)  # zeros


if __name__ == "__main__":
    import tyro

    train(tyro.cli(TransformerTraining))
