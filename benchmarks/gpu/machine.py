"""The stage `machine`: an extension that runs on the GPU, what the machine is, and the most that it was seen to do."""

import datetime
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from timing import DEVICE, DEVICE_NAME, TOY, peaks

from . import build
from .record import Record, from_arguments

PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy", "pytest", "pytest-xdist")
QUERY = "name,driver_version,clocks.max.sm,clocks.max.mem,clocks.sm,clocks.mem,power.limit,temperature.gpu,memory.total"


def main() -> None:
    record = from_arguments()
    record.put(**about())
    record.put(build=build_or_why_not(record))
    here = peaks(torch.bfloat16, torch.float16, torch.float32, torch.int8)
    record.put(
        peaks={
            "copy, GB/s": round(here.copy / 1e9, 2),
            "exponentials, T/s": round(here.exps / 1e12, 3) if here.exps < float("inf") else None,
            "products, TFLOP/s": {str(dtype): round(rate / 1e12, 3) for dtype, rate in here.products.items()},
        }
    )
    from cogvx_kernels import _extension, explain  # after the build, which makes what this imports

    record.put(extension=_extension.built_with(), backends=explain())
    record.finish()


def build_or_why_not(record: Record) -> dict:
    """How the extension was had. Without a GPU one operator is compiled, to see that the compilers would do."""
    if DEVICE == "cuda":
        try:
            return build.ensure(record.seconds_left)
        except RuntimeError as error:  # what needs no extension can still be tested and measured
            return {"how": None, "why not": str(error)}
    if not shutil.which(os.environ.get("CXX") or "g++"):
        return {"how": None, "why not": "no C++ compiler"}
    with tempfile.TemporaryDirectory() as folder:
        build.compile_directly(Path(folder) / build.NAME, None, record.seconds_left, only="expert_layernorm")
    return {"how": "one operator, as a trial", "installed": build.why_not()}


def about() -> dict:
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dry_run": TOY,
        "device": DEVICE_NAME,
        "commit": said("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "cuda of torch": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvcc": (said("nvcc", "--version") or "").splitlines()[-2:],
        "g++": (said("g++", "--version") or "").splitlines()[:1],
        "cpus": len(os.sched_getaffinity(0)),
    }
    if DEVICE == "cuda":
        one = torch.cuda.get_device_properties(0)
        found["capability"] = f"{one.major}.{one.minor}"
        found["multiprocessors"] = one.multi_processor_count
        found["cache, MB"] = one.L2_cache_size / 1e6
        found["memory, GB"] = round(one.total_memory / 1e9, 1)
        values = (said("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0") or "").split(", ")
        found["nvidia-smi"] = dict(zip(QUERY.split(","), values, strict=False))
    return found


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def said(*command: str) -> str | None:
    """What a command prints, or None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    main()
