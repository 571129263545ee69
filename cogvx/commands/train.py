"""cogvx train: train a transformer, a LoRA or a VAE on a folder of clips, or a ladder of transformers."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


def main(
    kind: Annotated[
        Positional[Literal["transformer", "lora", "vae", "ladder"]], arg(metavar="transformer|lora|vae|ladder")
    ],
    options: Annotated[Positional[tuple[str, ...]], arg(metavar="[CONFIG.toml] [KEY=VALUE ...]")] = (),
    dry_run: bool = False,
    print_config: bool = False,
) -> None:
    """Train on a folder of clips, each with its caption in a .txt file of the same name (a VAE needs none).

    A stopped run goes on where its last state was saved; on SIGTERM it saves one and ends.

    Args:
        kind: all of the transformer, a LoRA beside it, which diffusers loads too, or the VAE; or a ladder of small
            transformers on Shapes World, and the law of their losses.
        options: a TOML file, and words that change it, such as data=clips out=runs/a optimiser.lr=1e-4; before flags.
        dry_run: check options, model and data, say what would be done, and stop.
        print_config: print every option and its value as TOML, and stop.
    """
    file = Path(options[0]) if options and "=" not in options[0] else None
    words = options[1:] if file else options
    if kind in ("vae", "ladder"):
        from ..parallel.processes import refuse_torchrun

        refuse_torchrun(f"cogvx train {kind}")
        (train_vae if kind == "vae" else train_ladder)(file, words, dry_run, print_config)
    else:
        train_transformer(file, [*words, f"kind={kind}"], dry_run, print_config)


def train_transformer(file: Path | None, words: Sequence[str], dry_run: bool, print_config: bool) -> None:
    from ..train.finetuning import Finetuning
    from ..train.options import read_options, to_toml

    run = read_options(Finetuning, file, words)
    if print_config:
        print(to_toml(run), end="")
        return

    from ..data.clips import accepted, find_clips
    from ..machine import own_device
    from ..train.finetune import learning, train
    from ..train.finetuning import configs_of, describe, examples_of, load_transformer, long_warmup, tokens_of, unit_of
    from ..train.ranks import ALONE, joined
    from ..train.shards import num_sharing, placed

    configs, device = configs_of(run), own_device(run.device)
    with joined(device.type) as ranks:
        # Before anything is computed; a dry run of one process says what each of so many would hold.
        sharing = (run.shard or 1) if dry_run and ranks is ALONE else num_sharing(run.shard, ranks)
        if ranks.is_first and (doubt := long_warmup(run)):
            warn(doubt)
        clips = accepted(find_clips(run.data, unit_of(configs), run.num_frames), run.on_fault, warn)
        tokens_of(run, clips, configs)
        model = load_transformer(run, configs)
        if dry_run:
            weights = sum(p.nbytes for p in model.parameters())
            learnt = sum(p.numel() for p in learning(run, model).values())
            if ranks.is_first:
                print(describe(run, clips, configs, learnt, weights, sharing))
            return
        with ranks.first_alone():
            known = examples_of(run, clips, configs)
        # Only now: while clips are encoded the device has another model to hold.
        step = train(run, placed(model, device, ranks, run.shard), *known, ranks)
        if ranks.is_first:
            report(run.out, step, run.num_steps)


def train_vae(file: Path | None, words: Sequence[str], dry_run: bool, print_config: bool) -> None:
    from ..train.options import read_options, to_toml
    from ..train.vae_clips import VAERun

    run = read_options(VAERun, file, words)
    if print_config:
        print(to_toml(run), end="")
        return

    from ..data.clips import accepted, find_clips
    from ..train.finetuning import long_warmup
    from ..train.vae_clips import load_perceptual, load_vae, train

    if doubt := long_warmup(run):
        warn(doubt)
    found = find_clips(run.data, (1, 1), run.least_frames, captions=False, least=(run.size, run.size))
    clips = accepted(found, run.on_fault, warn)
    vae, perceptual = load_vae(run), load_perceptual(run)
    if dry_run:
        count = sum(p.numel() for p in vae.parameters())
        print(f"{len(clips)} clips; {run.num_steps} steps of {run.batch} crops of {run.num_frames} frames and "
              f"{run.size} x {run.size} pixels; {count:,} numbers learn")  # fmt: skip
        return
    report(run.out, train(run, vae, clips, perceptual), run.num_steps)


def train_ladder(file: Path | None, words: Sequence[str], dry_run: bool, print_config: bool) -> None:
    from ..train.options import TrainingError, read_options, to_toml

    if missing := [name for name in ("scipy", "matplotlib") if find_spec(name) is None]:
        raise TrainingError(f"a ladder needs {' and '.join(missing)}; pip install 'cogvx[ladder]' has both")

    from ..train.ladder import Ladder, climb, flops_of, weights_of

    run = read_options(Ladder, file, words)
    if print_config:
        print(to_toml(run), end="")
        return
    if dry_run:
        for config, steps in run.rungs():
            print(f"{weights_of(config):,} weights, {steps} steps, {flops_of(config, steps * run.batch):.2e} FLOP")
        return
    from ..train.ladder_report import write

    print(write(climb(run), run.out))


def warn(message: str) -> None:
    print(f"cogvx: warning: {message}", file=sys.stderr)


def report(out: Path, step: int, num_steps: int) -> None:
    done = "" if step >= num_steps else f", stopped before {num_steps}; the same command goes on"
    print(f"{out}  step {step}{done}")
