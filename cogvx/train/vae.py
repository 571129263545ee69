"""Train the causal VAE on Shapes World: reconstruction, KL, perceptual and 3D-discriminator losses, in stages.

    python -m cogvx.train.vae --out runs/vae

Images come first, then short clips, then whole ones, as in the published stages. Every step's data and noise follow
from (seed, step), so a stopped run resumes exactly where it was.
"""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import PRESETS, VAEConfig
from ..data import shapes
from ..data.pixels import to_tensor
from ..machine import multiplies_bf16
from ..models.discriminator import PatchDiscriminator
from ..models.vae import CausalVAE
from .checkpoint import restore, save_state
from .log import Log
from .losses import LossWeights, Perceptual, discriminator_step, vae_loss
from .optim import muon_adamw, warmup_hold_decay
from .shards import States


@dataclass(frozen=True)
class Stage:
    """Steps on clips of one length."""

    num_frames: int
    batch: int
    num_steps: int
    decoder_only: bool = False  # the encoder stands still, so that latents can be computed already
    adversarial: bool = False


@dataclass(frozen=True)
class VAETraining:
    """Settings of a run; the defaults made the embedded checkpoint."""

    out: Path = Path("runs/vae")
    stages: tuple[Stage, ...] = (
        Stage(num_frames=1, batch=16, num_steps=500),
        Stage(num_frames=9, batch=4, num_steps=600),
        Stage(num_frames=17, batch=4, num_steps=600),
        Stage(num_frames=17, batch=4, num_steps=900, decoder_only=True),
        Stage(num_frames=17, batch=4, num_steps=200, decoder_only=True, adversarial=True),
    )
    muon_lr: float = 0.02
    adamw_lr: float = 1e-3
    num_warmup: int = 50  # steps of the learning rate's rise and fall, in each of the two phases:
    num_decay: tuple[int, int] = (400, 900)  # both halves of the model, then the decoder alone
    clip_norm: float = 1.0
    weights: LossWeights = field(default_factory=lambda: LossWeights(l1=1.0, l2=2.0, kl=1e-4))
    discriminator_lr: float = 2e-4
    save_every: int = 100
    bf16: bool | None = None  # in autocast; None is where the CPU has instructions for it
    seed: int = 0
    config: VAEConfig = PRESETS["tiny"].vae

    def stage_at(self, step: int) -> Stage:
        for stage in self.stages:
            if step < stage.num_steps:
                return stage
            step -= stage.num_steps
        raise ValueError(f"step is {step} past the last stage")

    @property
    def num_steps(self) -> int:
        return sum(stage.num_steps for stage in self.stages)

    @property
    def num_joint_steps(self) -> int:
        return sum(stage.num_steps for stage in self.stages if not stage.decoder_only)

    def share_at(self, step: int) -> float:
        """The share of the full learning rates at a step."""
        joint = self.num_joint_steps
        if step < joint:
            return warmup_hold_decay(step, joint, self.num_warmup, self.num_decay[0])
        return warmup_hold_decay(step - joint, self.num_steps - joint, self.num_warmup, self.num_decay[1])


def train(run: VAETraining, perceptual: Perceptual | None = None) -> CausalVAE:
    """Train to the end and return the model; resumes from `run.out` where an earlier call stopped there.

    `perceptual(reconstruction, video)` is a distance over a feature network, both [B, 3, T, H, W].
    """
    torch.manual_seed(run.seed)
    vae, discriminator = CausalVAE(run.config), PatchDiscriminator()
    optimiser = muon_adamw(vae, run.muon_lr, run.adamw_lr, ("conv_y", "conv_b", "conv_in", "conv_out", "shortcut"))
    judge_optimiser = torch.optim.AdamW(discriminator.parameters(), run.discriminator_lr, betas=(0.5, 0.9))
    parts = {"vae": vae, "discriminator": discriminator, "optimiser": optimiser,
             "judge_optimiser": States(judge_optimiser)}  # fmt: skip
    step = restore(run.out, parts)
    bf16 = multiplies_bf16() if run.bf16 is None else run.bf16
    run.out.mkdir(parents=True, exist_ok=True)
    with Log(run.out / "log.jsonl", step) as log:
        while step < run.num_steps:
            start, stage = time.perf_counter(), run.stage_at(step)
            video, generator = batch(run.seed, step, stage), torch.Generator().manual_seed(run.seed * 1_000_003 + step)
            vae.encoder.requires_grad_(not stage.decoder_only)
            with torch.autocast("cpu", torch.bfloat16, bf16):
                posterior = vae.encode(video)
                output = vae.decode(posterior.sample(generator))
            output, row = output.float(), {}
            weights = replace(run.weights, adversarial_start=0 if stage.adversarial else None)
            last = vae.decoder.conv_out.conv.weight
            total = vae_loss(output, video, posterior, weights, step, row, perceptual, discriminator, last)
            vae.zero_grad()
            total.backward()
            row["gradient"] = torch.nn.utils.clip_grad_norm_(vae.parameters(), run.clip_norm, error_if_nonfinite=True)
            optimiser.step(run.share_at(step))
            if stage.adversarial:
                row["judge"] = discriminator_step(discriminator, judge_optimiser, output.detach(), video)
            step += 1
            row = {
                "step": step,
                **{k: float(v.detach()) for k, v in row.items()},
                "seconds": time.perf_counter() - start,
            }
            log.write(row)
            if step % run.save_every == 0 or step == run.num_steps:
                save_state(run.out, step, {name: part.state_dict() for name, part in parts.items()})
    return vae


def batch(seed: int, step: int, stage: Stage) -> Tensor:
    """The step's clips, [B, 3, T, H, W] in [-1, 1]."""
    rng = np.random.default_rng((seed, step))
    clips = [shapes.render(shapes.sample_scene(rng), rng) for _ in range(stage.batch)]
    starts = [rng.integers(len(clip) - stage.num_frames + 1) for clip in clips]
    video = np.stack([clip[i : i + stage.num_frames] for clip, i in zip(clips, starts, strict=True)])
    return to_tensor(video)


if __name__ == "__main__":
    import tyro

    train(tyro.cli(VAETraining))
