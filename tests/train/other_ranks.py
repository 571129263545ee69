"""Runs that go on with another number of processes, which share the weights out or not.

`python other_ranks.py` fails where losses, weights, averages or the optimiser's states are not those of one process.
"""

import dataclasses
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from test_finetune import draws, examples, model, options, stopped_at  # beside this file

from cogvx.models.transformer import ExpertTransformer
from cogvx.train.checkpoint import load_state
from cogvx.train.finetune import train
from cogvx.train.finetuning import Finetuning, Optimiser
from cogvx.train.ranks import ALONE, Ranks
from cogvx.train.shards import placed

STOP, STEPS, LIMIT, TENSORS = 5, 15, 1e-5, 1e-4
# Processes, and how many of them hold a copy of the weights between them, until a stop and after it.
RUNS = {
    "1 -> 2": [(1, 1), (2, 1)],
    "2 -> 1": [(2, 1), (1, 1)],
    "2 sharded -> 1 -> 2 sharded": [(2, 2), (1, 1), (2, 2)],
}
COPIES = {"4 in two copies": [(4, 2)]}  # `python other_ranks.py copies`
# Of six samples a step, in sequences of different lengths: more for the first process than for the second.
SET_UP = {"accumulation": 3, "pack_tokens": 24, "ema_decay": 0.9}


def options_of(folder: Path) -> Finetuning:
    return options(folder, num_steps=STEPS, save_every=100, optimiser=Optimiser(lr=1e-3, num_warmup=1), **SET_UP)


def go_on(run: Finetuning, ranks: Ranks, stop: int | None, shard: int = 1) -> None:
    """Train to the end, or to step `stop`, a few steps on, in which the last of the processes has a SIGTERM."""
    patch = stopped_at(STOP - 1) if stop and ranks.rank == ranks.size - 1 else None
    here, total = placed(model(), torch.device("cpu"), ranks, shard), sum(p.numel() for p in model().parameters())
    if shard > 1:  # slices are rounded up, of few rows by much
        assert sum(p.to_local().numel() for p in here.parameters()) < 1.1 * total / shard
    reached = train(run, here, examples(), draws(), ranks)
    if patch is not None:
        patch.undo()
    assert reached == (stop or STEPS), reached


def go_on_in(count: int, run: Finetuning, stop: int | None = None, shard: int = 1) -> None:
    if count == 1:
        return go_on(run, ALONE, stop)
    children = []
    with tempfile.TemporaryDirectory() as place:
        for rank in range(count):  # forked, so that torch is imported once
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=count)
                    go_on(run, Ranks(dist.group.WORLD), stop, shard)
                    dist.destroy_process_group()
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            children.append(child)
        if max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children):
            raise SystemExit("a process failed")


def losses(run: Finetuning) -> list[float]:
    rows = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), rows
    return [row["loss"] for row in rows]


def tensors(run: Finetuning) -> dict[str, torch.Tensor]:
    """All that the last state holds and what was made of it."""
    step, trees = load_state(run.out)
    assert step == STEPS
    found = {f"{part} {name}": value for part in ("model", "average") for name, value in trees[part].items()}
    for index, states in trees["optimiser"]["state"].items():
        found |= {f"optimiser {index} {name}": value for name, value in states.items()}
    made = ExpertTransformer.from_pretrained(run.out / "transformer").state_dict()
    return found | {f"result {name}": value for name, value in made.items()}


def main(runs: dict[str, list[tuple[int, int]]]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        alone = options_of(Path(folder) / "alone")
        go_on_in(1, alone)
        wanted, known = losses(alone), tensors(alone)
        for number, (name, ways) in enumerate(runs.items()):
            run = options_of(Path(folder) / str(number))
            stops = [STOP * (i + 1) for i in range(len(ways) - 1)]
            for stop, (count, shard) in zip([*stops, None], ways, strict=True):
                checkpointing = shard > 1 and stop is not None  # once sharded with it, once without
                go_on_in(count, dataclasses.replace(run, checkpointing=checkpointing), stop, shard)
            worst = max(abs(one - other) / other for one, other in zip(losses(run), wanted, strict=True))
            found = tensors(run)
            assert found.keys() == known.keys()
            apart = max(float((found[key] - known[key]).abs().max() / known[key].abs().max()) for key in known)
            print(f"{name}: losses differ by {worst:.1e} at most, tensors by {apart:.1e}", flush=True)
            if not (worst <= LIMIT and apart <= TENSORS):
                raise SystemExit(f"{name}: above {LIMIT} or {TENSORS}")


if __name__ == "__main__":
    sys.exit(main(COPIES if "copies" in sys.argv else RUNS))
