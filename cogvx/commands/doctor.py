"""cogvx doctor: print versions, devices, and which kernels run."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

Rows = Iterator[tuple[str, str]]
PACKAGES = ("torch", "triton", "transformers", "safetensors", "huggingface_hub", "av", "numpy", "diffusers")


def main() -> None:
    """Print versions, devices, which backends of each operator run here, why not the others, and what is built in."""
    sections = {
        "versions": versions(),
        "devices": devices(),
        "operators, preferred backend first": operators(),
        "compiled extension": extension(),
        "embedded checkpoints": embedded_checkpoints(),
    }
    for title, rows in sections.items():
        found = list(rows)
        width = max(len(name) for name, _ in found)
        print(title)
        for name, text in found:
            print(f"  {name:{width}}  {text}")
        print()


def versions() -> Rows:
    from ..version import __version__

    yield "cogvx", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"


def devices() -> Rows:
    import torch

    threads, cores = torch.get_num_threads(), os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    yield "cpu", f"{platform.machine()}, capability {capability}, {threads} threads on {cores} cores"
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}", f"{about.name}, capability {about.major}.{about.minor}, {about.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield "cuda", f"none: torch is {built} and finds no GPU"


def operators() -> Rows:
    from cogvx_kernels import explain

    for name, backends in explain().items():
        live = [backend for backend, reason in backends.items() if reason == "live"]
        dead = [f"no {backend}: {reason}" for backend, reason in backends.items() if reason != "live"]
        yield name, "; ".join([", ".join(live), *dead])


def extension() -> Rows:
    from cogvx_kernels._extension import built_with

    about = built_with()
    if about["missing"]:
        yield "missing", about["missing"]
        return
    yield "compiler", about["compiler"]
    yield "OpenMP", about["openmp"] or "no: the kernels run in one thread"
    yield "CPU variants", f"{', '.join(about['cpu_isas'])}; this machine takes {about['cpu_isa']}"
    yield "CUDA", f"{about['cuda']}, for {about['cuda_archs']}" if about["cuda"] else f"no: {about['cuda_reason']}"


def embedded_checkpoints() -> Rows:
    from ..models.checkpoint import EMBEDDED
    from ..models.saving import content_hash

    for name, folder in EMBEDDED.items():
        files = [path for path in folder.rglob("*") if path.is_file()]
        yield name, str(folder)
        if not files:
            yield "missing", "this build carries none; name a checkpoint with --model, or train it: make tiny"
            continue
        yield "size", f"{sum(path.stat().st_size for path in files) / 2**20:.1f} MiB in {len(files)} files"
        yield "sha-256", content_hash(folder)
