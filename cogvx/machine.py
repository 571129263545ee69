"""What this machine has and how models run on it: devices, dtypes, memory and versions."""

import json
import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .settings import SettingsError
from .version import __version__


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, else a GPU where there is one. Raises SettingsError for one that is not there."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(device or best)
        torch.empty(1, device=picked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # an unknown word; no such device; no driver
        reason = str(error).strip().split("\n")[0]
        raise SettingsError(f"device is {str(device)!r}, which is not to be had ({reason}); valid: {best}") from error
    return picked


def own_device(device: str | torch.device | None) -> torch.device:
    """The same for one of torchrun's processes: of GPUs asked for without a number its own, which becomes the default.

    Nothing is made on another GPU first: on the first one every process would leave a context of hundreds of MB.
    """
    if torch.cuda.is_available() and str(device or "cuda") == "cuda":
        device = f"cuda:{dist.get_node_local_rank(fallback_rank=0)}"
    picked = pick_device(device)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    return picked


def computable(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The model, but in fp32 where fp16 weights are on a CPU and no dtype was asked for: fp16 is slow there."""
    weight = next(model.parameters())
    slow = dtype is None and weight.dtype == torch.float16 and weight.device.type == "cpu"
    return model.float() if slow else model


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16; without them they take forty times as long as in fp32."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def environment(device: torch.device) -> dict:
    """What else the bytes of a video depend on: versions, device and its capability."""
    gpu = device.type == "cuda"
    return {
        "cogvx": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "av": version("av"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if gpu else f"{device.type} {platform.machine()}",
        "capability": str(torch.cuda.get_device_capability(device)) if gpu else torch.backends.cpu.get_cpu_capability(),
    }


def peak_memory(device: torch.device) -> int:
    """The most memory held so far, in bytes: of the GPU by tensors, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if platform.system() == "Windows":
        return 0
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_of_tensors(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors made during a call held at once, those inside operators too."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_bytes())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
