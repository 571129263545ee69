"""The stage `sanitizer`: the small contract cases under compute-sanitizer's four tools.

`python -m gpu.sanitizer` without arguments makes those calls, forward and backward; the stage runs it under each tool.
Tensors get memory of their own (PYTORCH_NO_CUDA_MEMORY_CACHING), so that an access past the end of one shows.
"""

import os
import re
import shutil
import sys
import time

import torch
from timing import DEVICE, TOY, synchronize

from cogvx_kernels import use_backend
from cogvx_kernels._op import OPS

from .commands import within
from .races import gradients_of, results, small_calls
from .record import Record, from_arguments

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 97  # the status of a tool that found something
BACKENDS = ("cuda",)  # Triton's kernels are its compiler's business; the tools' time goes to ours


def main() -> None:
    if len(sys.argv) == 1:
        make_calls()
        return
    record = from_arguments()
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    tools = TOOLS if tool and DEVICE == "cuda" else ("no tool",)
    if tools != TOOLS:
        record.put(absent="compute-sanitizer is not installed" if not tool else "there is no GPU")
    for name in tools:  # half of the time to the first: a tool needs most of a few seconds for its start
        run(record, tool, name, record.seconds_left() / 2)
    record.finish()
    rows = record.content["rows"]
    found = any(row["outcome"] == "found something" for row in rows)
    raise SystemExit(1 if found or not any(row["calls"] for row in rows) else 0)


def run(record: Record, tool: str | None, name: str, seconds: float) -> None:
    """One row: what a tool said of the calls."""
    words = [sys.executable, "-m", "gpu.sanitizer"]
    if tool and name in TOOLS:
        words = [tool, "--tool", name, "--error-exitcode", str(FOUND), "--print-limit", "20", *words]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    before = time.monotonic()
    status, said = within(seconds, words, env=environment)
    if status is None:
        record.add(tool=name, outcome=f"stopped after {seconds:.0f} s", calls=calls_in(said))
        return
    outcome = {0: "nothing found", FOUND: "found something"}.get(status, f"failed with {status}")
    row = {"tool": name, "outcome": outcome, "calls": calls_in(said), "seconds": round(time.monotonic() - before, 1)}
    record.add(**row, **({} if status == 0 else {"said": said[-3000:]}))


def calls_in(said: str) -> int:
    """How many calls were made, by what the program wrote."""
    return len(re.findall(r"^call ", said, re.MULTILINE))


def make_calls() -> None:
    """Each small case once, the gradients too; a line for each, so that a stopped run tells how far it came."""
    for name, backend, args in small_calls():
        if backend not in BACKENDS and not TOY:
            continue
        if TOY and (backend == "triton" or name != "expert_layernorm"):
            continue
        with use_backend(backend):
            results(name, args)
            if OPS[name].differentiable and args[0].numel():
                gradients_of(name, args)()
        synchronize()
        print(f"call {name} {backend} {args[0].dtype} {list(args[0].shape)}", flush=True)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
