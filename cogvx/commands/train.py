"""cogvx train: train a transformer, or a LoRA, on a folder of clips with captions."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


def main(
    kind: Annotated[Positional[Literal["transformer", "lora"]], arg(metavar="transformer|lora")],
    options: Annotated[Positional[tuple[str, ...]], arg(metavar="[CONFIG.toml] [KEY=VALUE ...]")] = (),
    dry_run: bool = False,
    print_config: bool = False,
) -> None:
    """Train on a folder in which every clip has its caption in a .txt file of the same name.

    A stopped run goes on where its last state was saved; on SIGTERM it saves one and ends.

    Args:
        kind: all of the transformer, or a LoRA beside it, which diffusers loads too.
        options: a TOML file, and words that change it, such as data=clips out=runs/a optimiser.lr=1e-4; before flags.
        dry_run: check options, model and data, say what would be done, and stop.
        print_config: print every option and its value as TOML, and stop.
    """
    from ..train.finetuning import Finetuning
    from ..train.options import read_options, to_toml

    file = Path(options[0]) if options and "=" not in options[0] else None
    run = read_options(Finetuning, file, [*(options[1:] if file else options), f"kind={kind}"])
    if print_config:
        print(to_toml(run), end="")
        return

    import sys

    from ..data.clips import accepted, find_clips
    from ..train.finetune import learning, train
    from ..train.finetuning import describe, examples_of, load_transformer, text_to_video_configs, unit_of

    configs = text_to_video_configs(run)
    report = find_clips(run.data, unit_of(configs), run.num_frames)
    clips = accepted(report, run.on_fault, lambda message: print(f"cogvx: warning: {message}", file=sys.stderr))
    model = load_transformer(run, configs)
    if dry_run:
        weights = sum(p.nbytes for p in model.parameters())
        learnt = sum(p.numel() for p in learning(run, model).values())
        print(describe(run, clips, configs, learnt, weights))
        return
    step = train(run, model, *examples_of(run, clips, configs))
    done = "" if step == run.num_steps else f", stopped before {run.num_steps}; the same command goes on"
    print(f"{run.out}  step {step}{done}")
