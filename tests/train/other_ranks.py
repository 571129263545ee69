"""A run that goes on with another number of processes: `python other_ranks.py` fails where its losses differ."""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from test_finetune import draws, examples, model, options, stopped_at  # beside this file

from cogvx.train.finetune import train
from cogvx.train.finetuning import Finetuning, Optimiser
from cogvx.train.ranks import ALONE, Ranks

STOP, STEPS, LIMIT = 5, 15, 1e-5
# Of six samples a step, in sequences of different lengths: more for the first process than for the second.
SET_UP = {"accumulation": 3, "pack_tokens": 24, "ema_decay": 0.9}


def options_of(folder: Path) -> Finetuning:
    return options(folder, num_steps=STEPS, save_every=100, optimiser=Optimiser(lr=1e-3, num_warmup=1), **SET_UP)


def go_on(run: Finetuning, ranks: Ranks, stop: bool) -> None:
    """Train to the end, or until the last of the processes has had a SIGTERM."""
    patch = stopped_at(STOP - 1) if stop and ranks.rank == ranks.size - 1 else None
    reached = train(run, model(), examples(), draws(), ranks)
    if patch is not None:
        patch.undo()
    assert reached == (STOP if stop else STEPS), reached


def go_on_in_two(run: Finetuning, stop: bool) -> None:
    children = []
    with tempfile.TemporaryDirectory() as place:
        for rank in range(2):  # forked, so that torch is imported once
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
                    go_on(run, Ranks(dist.group.WORLD), stop)
                    dist.destroy_process_group()
                    status = 0
                finally:
                    os._exit(status)
            children.append(child)
        if max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children):
            raise SystemExit("a process of two failed")


def losses(run: Finetuning) -> list[float]:
    rows = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), rows
    return [row["loss"] for row in rows]


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        more, fewer, alone = (options_of(Path(folder) / name) for name in ("more", "fewer", "alone"))
        go_on_in_two(fewer, stop=True)
        go_on(more, ALONE, stop=True)
        go_on_in_two(more, stop=False)
        go_on(fewer, ALONE, stop=False)
        go_on(alone, ALONE, stop=False)
        for direction, run in (("1 -> 2", more), ("2 -> 1", fewer)):
            worst = max(abs(one - other) / other for one, other in zip(losses(run), losses(alone), strict=True))
            print(f"{direction}: losses differ by {worst:.1e} at most", flush=True)
            if not worst <= LIMIT:
                raise SystemExit(f"{direction}: {worst} is above {LIMIT}")


if __name__ == "__main__":
    sys.exit(main())
