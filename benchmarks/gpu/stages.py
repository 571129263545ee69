"""The stages in the order of their worth, and what runs them one after another within the time that there is.

Each is a process of its own, so that one that crashes, hangs or upsets the device takes no other with it. One that
fails or needs too long is written down as such, with what it had found until then, and the next one goes on.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import table
from .commands import within

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 560  # seconds of a whole run, which begins when torch was imported twice
DRY = 600  # seconds that each stage may take in a dry run: only one that hangs, on however busy a machine


@dataclass(frozen=True)
class Stage:
    name: str  # of its file
    words: tuple[str, ...]  # after `python -m`
    seconds: int  # at most


STAGES = (
    Stage("machine", ("gpu.machine",), 130),
    Stage("primitives", ("gpu.suite",), 25),
    Stage("operator_tests", ("gpu.suite",), 130),
    Stage("model_tests", ("gpu.suite",), 40),
    Stage("operators", ("gpu.operators",), 110),
    Stage("models", ("gpu.models",), 80),
    Stage("races", ("gpu.races",), 30),
    Stage("sanitizer", ("gpu.sanitizer",), 60),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__.splitlines()[0])
    default = os.environ.get("OUT") or ROOT / "benchmarks" / "results"
    parser.add_argument("folder", nargs="?", type=Path, default=Path(default), help="where results go")
    parser.add_argument("--dry-run", action="store_true", help="every stage at toy sizes on the CPU")
    parser.add_argument("--only", default="", help="these stages alone, by name, with commas between")
    parser.add_argument("--seconds", type=float, help=f"for everything; {TOTAL}, or {DRY} a stage in a dry run")
    given = parser.parse_args()
    wanted = [name for name in given.only.split(",") if name]
    unknown = set(wanted) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(f"--only: {sorted(unknown)[0]!r} is none of {', '.join(stage.name for stage in STAGES)}")
    if not given.dry_run and not _has_gpu():
        parser.error("torch sees no GPU; --dry-run runs the same stages without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage that runs is ended too
    stages = [stage for stage in STAGES if not wanted or stage.name in wanted]
    seconds = given.seconds or (DRY * len(stages) if given.dry_run else TOTAL)
    passed = run(stages, given.folder.resolve(), given.dry_run, seconds)
    sys.exit(0 if passed else 1)


def run(stages: Sequence[Stage], folder: Path, dry: bool, seconds: float) -> bool:
    """Whether every stage ended well. `stages.json` tells what became of each, `table.md` what they found."""
    folder.mkdir(parents=True, exist_ok=True)
    end, outcomes = time.monotonic() + seconds, {}
    for stage in STAGES:  # nothing of an earlier run may pass for this one's
        for old in folder.glob(f"{stage.name}.*"):
            old.unlink()
    for stage in stages:
        limit = min(DRY if dry else stage.seconds, end - time.monotonic())
        outcome = _run_one(stage, folder, dry, limit) if limit > 2 else {"outcome": "no time was left", "seconds": 0}
        outcomes[stage.name] = outcome
        _write(folder / "stages.json", json.dumps({"dry_run": dry, "stages": outcomes}, indent=1) + "\n")
        _write(folder / "table.md", table.of(folder))
        print(f"{stage.name}: {outcome['outcome']}, {outcome['seconds']} s", flush=True)
    print((folder / "table.md").read_text())
    return all(outcome["outcome"] == "done" for outcome in outcomes.values())


def _run_one(stage: Stage, folder: Path, dry: bool, limit: float) -> dict:
    file, log = folder / f"{stage.name}.json", folder / f"{stage.name}.log"
    command = [sys.executable, "-m", *stage.words, str(file), f"{limit:.0f}"]
    before = time.monotonic()
    with log.open("w") as output:
        status, _ = within(limit, command, cwd=ROOT, env=_environment(dry), stdout=output)
    outcome = {0: "done", None: f"stopped after {limit:.0f} s"}.get(status, f"failed with status {status}")
    return {"outcome": outcome, "seconds": round(time.monotonic() - before, 1)}


def _environment(dry: bool) -> dict[str, str]:
    """Of a stage; a dry run sees no GPU, so that it does the same on every machine."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if dry:
        environment |= {
            "CUDA_VISIBLE_DEVICES": "",
            "TRITON_INTERPRET": "1",
            "COGVX_BENCH_TOY": "1",
            "OMP_NUM_THREADS": "1",
        }
    return environment


def _has_gpu() -> bool:
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def _write(path: Path, text: str) -> None:
    written = path.with_name(path.name + ".writing")
    written.write_text(text)
    os.replace(written, path)
