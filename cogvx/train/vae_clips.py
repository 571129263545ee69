"""Train the VAE on a folder of clips: crops of one length and size, at frame rates that differ from sample to sample.

    cogvx train vae run.toml model=tiny data=clips out=runs/vae num_frames=17 size=256

The published stages are runs one after another: short clips with strides 1 and 2, longer ones, each starting from the
checkpoint before. A stopped run goes on exactly where its last state was saved.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from ..data.clips import Clip
from ..data.pixels import to_tensor
from ..data.video import read_video
from ..machine import pick_device
from ..models.discriminator import PatchDiscriminator
from ..models.vae import CausalVAE
from ..settings import read_configs
from .ahead import ahead
from .average import Average
from .checkpoint import Saver, restore
from .finetuning import Optimiser, check, check_loop
from .log import Log
from .losses import LossWeights, Perceptual, discriminator_step, vae_loss
from .optim import adamw, cosine, set_rate, state_name
from .options import to_toml
from .perceptual import ConvFeatures, PerceptualDistance
from .randomness import RandomStates
from .run import Progress, Weights, is_usable, stopping
from .sampling import rows_of
from .shards import States

HELD = 2**30  # bytes of clips that are kept in memory once they are read, by all workers together


@dataclass(frozen=True)
class VAERun:
    """A run on a folder of clips; captions are not needed."""

    data: Path
    out: Path
    model: str = "tiny"  # whose VAE is trained, or its sizes alone where it starts from nothing
    start: Literal["checkpoint", "scratch"] = "checkpoint"
    backbone: str | None = None  # of the perceptual distance: a folder, or "random" for features of random weights
    num_frames: int = 17  # 8N+1
    size: int = 256  # height and width of the crops, in pixels
    strides: tuple[int, ...] = (1, 2)  # for each sample one of those is drawn that its clip is long enough for
    crops: Literal["random", "fixed"] = "random"  # fixed: always the first frames, from the centre
    on_fault: Literal["stop", "skip"] = "stop"
    num_steps: int = 1000
    workers: int = 0  # processes that read the next steps' clips while the model computes
    batch: int = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    ema_decay: float | None = None
    non_finite: Literal["stop", "skip"] = "stop"
    save_every: int = 100
    keep_last: int = 2
    tensorboard: bool = False  # what log.jsonl holds, in `out`/tensorboard too
    seed: int = 0
    device: str | None = None
    optimiser: Optimiser = field(default_factory=Optimiser)
    discriminator_lr: float = 1e-4
    weights: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        check_loop(self, "num_steps", "batch", "save_every", "keep_last")
        check("num_frames", self.num_frames, self.num_frames >= 1 and self.num_frames % 8 == 1, "8N+1, from 1 on")
        check("discriminator_lr", self.discriminator_lr, self.discriminator_lr > 0, "above 0")
        check("size", self.size, self.size >= 8 and self.size % 8 == 0, "a multiple of 8")
        for name in ("l1", "l2", "perceptual", "kl", "adversarial"):
            check(f"weights.{name}", getattr(self.weights, name), getattr(self.weights, name) >= 0, "at least 0")
        start = self.weights.adversarial_start
        check("weights.adversarial_start", start, start is None or start >= 0, "at least 0, or none")
        check("strides", self.strides, len(self.strides) > 0 and min(self.strides) >= 1, "whole numbers from 1")

    @property
    def least_frames(self) -> int:
        """How many frames a clip must have: those that the smallest stride reaches over, 8N+1."""
        return (self.num_frames - 1) * min(self.strides) + 1


def load_vae(run: VAERun) -> CausalVAE:
    """The VAE to train, in fp32."""
    device = pick_device(run.device)
    if run.start == "scratch":
        torch.manual_seed(run.seed)
        return CausalVAE(read_configs(run.model).vae).to(device)
    return CausalVAE.from_pretrained(run.model, dtype=torch.float32, device=device)


def load_perceptual(run: VAERun) -> Perceptual | None:
    """The perceptual distance. Raises CheckpointError for a folder that holds no network."""
    if run.backbone is None:
        return None
    random = run.backbone == "random"
    distance = PerceptualDistance(ConvFeatures.random(0)) if random else PerceptualDistance.from_folder(run.backbone)
    return distance.to(pick_device(run.device))


def train(run: VAERun, vae: CausalVAE, clips: list[Clip], perceptual: Perceptual | None = None) -> int:
    """Train to the end, or until SIGTERM, resuming from `run.out`; the step that was reached.

    Raises TrainingError for a loss or gradient that is not finite, before any weight changes (unless those steps are to
    be skipped), and CheckpointError for a state in `run.out` that is damaged or of another run.
    """
    torch.manual_seed(run.seed)
    device, rates = vae.encoder.conv_in.conv.weight.device, run.optimiser
    judge, parameters = PatchDiscriminator().to(device), dict(vae.train().requires_grad_(True).named_parameters())
    optimiser = adamw(parameters.values(), rates)
    judge_optimiser = torch.optim.AdamW(judge.parameters(), run.discriminator_lr, betas=(0.5, 0.9))
    average = Average(parameters, run.ema_decay) if run.ema_decay is not None else None
    progress = Progress()
    parts = {"vae": Weights(parameters), "discriminator": judge, state_name(rates): States(optimiser),
             "progress": progress, "judge_optimiser": States(judge_optimiser), "random": RandomStates()}  # fmt: skip
    parts |= {"average": average} if average is not None else {}
    step = restore(run.out, parts)
    run.out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        trees = {name: part.state_dict() for name, part in parts.items()}
        saver.save(run.out, step, trees, run.keep_last, beside=lambda f: (f / "run.toml").write_text(to_toml(run)))

    with (
        stopping() as is_stopped,  # until all is on the disk
        Saver() as saver,
        Log(run.out / "log.jsonl", step, run.tensorboard) as log,
        ahead(partial(crops, run, clips, Frames()), range(step, run.num_steps), run.workers) as videos,
    ):
        stopped = False
        while step < run.num_steps and not stopped:
            start, share, row = time.perf_counter(), cosine(step, run.num_steps, rates.num_warmup, rates.least), {}
            set_rate(optimiser, rates.lr * share)
            video = next(videos).to(device)
            loss, output = forward(run, vae, judge, video, step, perceptual, row)
            loss.backward()
            gradient = nn.utils.clip_grad_norm_(parameters.values(), rates.clip_norm).item()
            if is_usable(run.non_finite, step, loss.item(), gradient, progress):
                optimiser.step()
                if average is not None:
                    average.update()
                if run.weights.is_adversarial(step):
                    may_step = partial(is_usable, run.non_finite, step, progress=progress, whose="the discriminator's")
                    row["judge"] = discriminator_step(judge, judge_optimiser, output, video, may_step=may_step)
            optimiser.zero_grad()
            step += 1
            row = {"step": step, "loss": loss.item(), "gradient": gradient, **{k: float(v) for k, v in row.items()}}
            log.write({**row, "skipped": progress.skipped, "seconds": time.perf_counter() - start})
            stopped = is_stopped()
            if step % run.save_every == 0 or step == run.num_steps or stopped:
                save()
        saver.wait()
        if step >= run.num_steps:
            write_result(run, vae, average)
    return step


def forward(
    run: VAERun,
    vae: CausalVAE,
    judge: PatchDiscriminator,
    video: Tensor,  # [B, 3, T, H, W]
    step: int,
    perceptual: Perceptual | None,
    row: dict,
) -> tuple[Tensor, Tensor]:
    """The loss, and the reconstruction in fp32."""
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
    with torch.autocast(video.device.type, torch.bfloat16) if run.precision == "bf16" else nullcontext():
        posterior = vae.encode(video)
        output = vae.decode(posterior.sample(generator))
    output, last = output.float(), vae.decoder.conv_out.conv.weight
    loss = vae_loss(output, video, posterior, run.weights, step, row, perceptual, judge, last)
    row |= {name: value.detach() for name, value in row.items()}
    return loss, output


def crops(run: VAERun, clips: list[Clip], frames: "Frames", step: int) -> Tensor:  # [B, 3, T, H, W] in [-1, 1]
    """The clips of a step, the next ones of an order that is another in every epoch, each from a place of its own."""
    rng, found = np.random.default_rng((run.seed, step)), []
    for row in rows_of(run.seed, step * run.batch, run.batch, len(clips)):
        video = frames.of(clips[row].file)
        strides = [s for s in run.strides if (run.num_frames - 1) * s < len(video)]
        if run.crops == "fixed":
            stride, places = strides[0], [0, *((size - run.size) // 2 for size in video.shape[1:3])]
        else:
            stride = int(rng.choice(strides))
            room = (len(video) - (run.num_frames - 1) * stride, *(size - run.size + 1 for size in video.shape[1:3]))
            places = [int(rng.integers(most)) for most in room]
        t, y, x = places
        taken = video[t : t + (run.num_frames - 1) * stride + 1 : stride]
        found.append(taken[:, y : y + run.size, x : x + run.size])
    return to_tensor(np.stack(found))


class Frames:
    """Videos by file; those read last stay in memory, as many as fit into `held` bytes, the newest always."""

    def __init__(self, held: int = HELD):
        self.held, self._kept = held, {}

    def of(self, file: Path) -> np.ndarray:  # uint8 [T, H, W, 3]
        worker = get_worker_info()
        held = self.held if worker is None else self.held // worker.num_workers
        video = self._kept.pop(file, None)
        self._kept[file] = video = read_video(file)[0] if video is None else video
        while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > held:
            del self._kept[next(iter(self._kept))]
        return video


def write_result(run: VAERun, vae: CausalVAE, average: Average | None) -> None:
    """The trained VAE in the published layout: the average of its weights where one is kept."""
    if average is not None:
        average.swap()
    vae.save_pretrained(run.out / "vae")
    if average is not None:
        average.swap()
