"""Train a transformer on a folder of clips: all of it, from a checkpoint or from nothing, or a LoRA.

    cogvx train lora run.toml model=tiny data=clips out=runs/lora

Text to video, or, for a model that takes an image, image to video: it is shown each clip's first frame. The latents of
clips and images and the captions' embeddings are computed once and kept on disk. A stopped run goes on exactly where
its last state was saved, with any number of processes.
"""

import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..config import TransformerConfig
from ..data.packing import num_tokens, pack
from ..diffusion.loss import velocity_loss
from ..models.choices import placement
from ..models.packed import forward_packed
from ..models.saving import save_model
from ..models.transformer import ExpertTransformer
from ..numerics import read_numerics
from .ahead import ahead
from .average import Average
from .checkpoint import Saver, restore
from .finetuning import Finetuning, base_hash
from .log import Log
from .lora import add_lora, save_learnt
from .optim import adamw, clip_gradients, cosine, set_rate, state_name
from .options import to_toml
from .randomness import RandomStates
from .ranks import ALONE, Ranks
from .run import Progress, Scaler, Weights, is_usable, stopping
from .sampling import Drawn, Draws, Example
from .shards import States, is_shared_out, whole

ADAPTER = "pytorch_lora_weights.safetensors"  # where diffusers looks for it


def learning(run: Finetuning, model: ExpertTransformer) -> dict[str, nn.Parameter]:
    """What learns, by name; for a LoRA its matrices are put into the model."""
    if run.kind == "transformer":
        return dict(model.requires_grad_(True).named_parameters())
    torch.manual_seed(run.seed)
    return add_lora(model, run.lora.rank, run.lora.alpha, run.lora.targets)


def train(
    run: Finetuning, model: ExpertTransformer, examples: list[Example], draws: Draws, ranks: Ranks = ALONE
) -> int:
    """Train to the end, or until SIGTERM, resuming from `run.out`; the step that was reached.

    Raises TrainingError for a loss or gradient that is not finite, before any weight changes (unless those steps are to
    be skipped; in fp16 for a gradient only at the least scale), and CheckpointError for a state in `run.out` that is
    damaged or of another run.
    """
    device, parameters, rates = model.proj_out.weight.device, learning(run, model.train()), run.optimiser
    optimiser = adamw(parameters.values(), rates)
    average = Average(parameters, run.ema_decay) if run.ema_decay is not None else None
    scaler = Scaler(device.type, enabled=run.precision == "fp16")
    progress = Progress(model.config.in_channels, base_hash(run), run.lora.alpha if run.kind == "lora" else None)
    parts = {"model": Weights(parameters), state_name(rates): States(optimiser), "random": RandomStates()}
    parts |= {"progress": progress} | ({"scaler": scaler} if scaler.is_enabled() else {})
    parts |= {"average": average} if average is not None else {}
    with ranks.first_alone():
        step = restore(run.out, parts)
        run.out.mkdir(parents=True, exist_ok=True)

    def save(saver: Saver) -> None:
        saver.wait()  # so that no two states are held at once
        trees = {name: whole(part.state_dict(), ranks.is_first, copy=True) for name, part in parts.items()}
        kept = run.keep_last, run.keep_best, progress.score()
        if ranks.is_first:
            beside = partial(write_beside, run, model)
            saver.save(run.out, step, trees, *kept, beside=beside, copy=False)

    draw = partial(draws.step, examples, count=run.batch * run.accumulation)
    with (
        stopping(ranks, device) as is_stopped,  # until all is on the disk
        Saver() as saver,
        Log(run.out / "log.jsonl" if ranks.is_first else None, step, run.tensorboard) as log,
        ahead(draw, range(step, run.num_steps), run.workers) as steps,
    ):
        stopped = False
        while step < run.num_steps and not stopped:
            start, share = time.perf_counter(), cosine(step, run.num_steps, rates.num_warmup, rates.least)
            set_rate(optimiser, rates.lr * share)
            loss = accumulate(run, model, next(steps), scaler, ranks)
            ranks.add_gradients(parameters.values())
            scaler.unscale_(optimiser)
            gradient = clip_gradients(parameters.values(), rates.clip_norm)
            if is_usable(run.non_finite, step, loss, gradient, progress, scaler.may_fall()):
                scaler.step(optimiser)
                progress.add(loss)
                if average is not None:
                    average.update()
            scaler.update()
            optimiser.zero_grad()
            step += 1
            row = {"step": step, "loss": loss, "gradient": gradient, "lr": rates.lr * share}
            log.write({**row, "skipped": progress.skipped, "seconds": time.perf_counter() - start})
            stopped = is_stopped()
            if step % run.save_every == 0 or step == run.num_steps or stopped:
                save(saver)
        saver.wait()
        if step >= run.num_steps:
            write_result(run, model, average, ranks)
        ranks.wait()
    return step


def accumulate(
    run: Finetuning, model: ExpertTransformer, drawn: list[Drawn], scaler: torch.amp.GradScaler, ranks: Ranks = ALONE
) -> float:
    """The mean loss of a step's samples; the gradient of those of this process is left in the model."""
    device, total = model.proj_out.weight.device, 0.0
    scaler.scale(torch.zeros((), device=device))  # a process without a sequence needs the scale as well
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.precision)
    work = sequences(run, model.config, drawn)
    shared = ranks.share_evenly(work) if is_shared_out(model) else [(part, 1.0) for part in ranks.share(work)]
    for part, counts in shared:
        samples = [each.sample._replace(latents=each.sample.latents.to(device), text=each.sample.text.to(device))
                   for each in part]  # fmt: skip
        # The largest one meets the ends of a sliced table, if any does.
        largest = max((tuple(each.latents.shape[1:]) for each in samples), key=math.prod)
        places = placement(model.config, read_numerics(run.numerics), largest)
        # Every weight is used once, so that a copy of it in the low precision is not worth keeping.
        with torch.autocast(device.type, low, cache_enabled=False) if low else nullcontext():
            predicted = model.run(forward_packed, samples, None, places, run.checkpointing)
        losses = [velocity_loss(y[None], each.clip.to(device)[None], each.noise.to(device)[None], each.alpha[None])
                  for y, each in zip(predicted, part, strict=True)]  # fmt: skip
        loss = counts * torch.cat(losses).sum() / len(drawn)
        scaler.scale(loss).backward()
        total += loss.item()
    return ranks.added(total, device)


def sequences(run: Finetuning, config: TransformerConfig, drawn: list[Drawn]) -> list[list[Drawn]]:
    """The samples that share a sequence: `run.batch` of them, or as many as `run.pack_tokens` hold."""
    if run.pack_tokens is None:
        return [drawn[first : first + run.batch] for first in range(0, len(drawn), run.batch)]
    samples = [each.sample for each in drawn]
    lengths = [num_tokens(config, each.latents.shape[1:], len(each.text)) for each in samples]
    return [[drawn[i] for i in indices] for indices in pack(lengths, run.pack_tokens)]


def write_beside(run: Finetuning, model: ExpertTransformer, folder: Path) -> None:
    """The options, and for a LoRA the file that others load, beside a state."""
    (folder / "run.toml").write_text(to_toml(run))
    if run.kind == "lora":
        save_learnt(model, folder / ADAPTER)


def write_result(run: Finetuning, model: ExpertTransformer, average: Average | None, ranks: Ranks) -> None:
    """What was trained, in the published layout: the average of its weights where one is kept."""
    if average is not None:
        average.swap()
    weights = whole(model.state_dict(), ranks.is_first)
    if ranks.is_first and run.kind == "lora":
        save_learnt(model, run.out / ADAPTER)
    elif ranks.is_first:
        save_model(model, run.out / "transformer", weights=weights)
    if average is not None:
        average.swap()
