"""How a call is timed, and the peaks of this machine that times are held against.

On a GPU events time the call, and before each round a buffer larger than the last cache is written, so that nothing is
found there that a model would not find. On a CPU a clock times it.
"""

import functools
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter

import torch
import torch.nn.functional as F
from cost import Cost, Peaks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE_NAME = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, in products that are so by default and in convolutions
# Small sizes do for a look at whether everything runs.
TOY = os.environ.get("COGVX_BENCH_TOY") == "1"
_EXPS_A_CLOCK = 16  # of a multiprocessor, from compute capability 8.0 to 12.x ("CUDA C++ Programming Guide")


@dataclass(frozen=True)
class Times:
    """Seconds of one call over some rounds."""

    median: float
    iqr: float
    rounds: int


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    if DEVICE == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    before = perf_counter()
    call()
    return perf_counter() - before


def times(call: Callable[[], object], rounds: int = 20, at_most: float = 1.0) -> Times:
    """Of a call that was warmed up: so many rounds, fewer (but three) where they would take longer than `at_most`."""
    found, before = [], perf_counter()
    while len(found) < rounds and (len(found) < 3 or perf_counter() - before < at_most):
        flush_cache()
        found.append(seconds(call))
    low, _, high = quantiles(found, n=4)
    return Times(median(found), high - low, len(found))


def flush_cache() -> None:
    """Write more than the GPU's last cache holds."""
    if DEVICE == "cuda":
        _larger_than_caches().zero_()


@functools.cache
def _larger_than_caches() -> torch.Tensor:
    return torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device=DEVICE)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes read plus written a second by a copy too large for any cache: the most that a kernel can stream."""
    source = torch.randn(2**18 if TOY else 2**28 if DEVICE == "cuda" else 2**24, device=DEVICE)
    target = torch.empty_like(source).copy_(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(10))


@functools.cache
def matmul_peak(dtype: torch.dtype) -> float:
    """Operations a second of the best large product, by a matrix or by a 1 × 1 convolution.

    On CPUs the two reach different libraries, of which either can be twice as fast as the other.
    """
    size = 256 if TOY else 8192 if DEVICE == "cuda" else 2048
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (size, size), dtype=dtype, device=DEVICE) for _ in range(2))
        calls = [lambda: torch._int_mm(a, b.t())]
    else:
        a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        x = a.reshape(1, 32, size // 32, size).permute(0, 3, 1, 2)  # channels last
        weight = b.reshape(size, size, 1, 1).contiguous(memory_format=torch.channels_last)
        calls = [lambda: a @ b, lambda: F.conv2d(x, weight)]
    rounds = 20 if DEVICE == "cuda" else 6
    return 2 * size**3 / min(seconds(call) for call in calls for _ in range(rounds))


@functools.cache
def exponentials() -> float:
    """The most exponentials a second: infinite on CPUs, where they are polynomials like everything else."""
    if DEVICE == "cpu":
        return float("inf")
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
    try:
        found = re.search(r"\d+", subprocess.run(query, capture_output=True, text=True).stdout)
    except FileNotFoundError:
        found = None
    if found is None:
        return float("inf")
    return _EXPS_A_CLOCK * torch.cuda.get_device_properties(0).multi_processor_count * int(found[0]) * 1e6


def peaks(*dtypes: torch.dtype) -> Peaks:
    """What this machine was seen to do at most, with products in these dtypes."""
    return Peaks(copy_bandwidth(), {dtype: matmul_peak(dtype) for dtype in dtypes}, exponentials())


def shares(cost: Cost, seconds: float, dtype: torch.dtype) -> dict[str, float]:
    """Rates of a call that took so long, and their shares of the peaks; the floor and the time's share of it."""
    used = [dtype] * bool(cost.flops) + [torch.int8] * bool(cost.int8_flops)
    here, found = peaks(*used), {}
    if cost.bytes and not used:
        found["GB/s"] = cost.bytes / seconds / 1e9
        found["share of copy bandwidth"] = cost.bytes / seconds / here.copy
    if used:
        rate = (cost.flops + cost.int8_flops) / seconds
        found["TFLOP/s"] = rate / 1e12
        found["share of matmul peak"] = rate / here.products[used[0]]
    found["floor, ms"] = cost.floor(here, dtype) * 1e3
    found["share of floor"] = cost.floor(here, dtype) / seconds
    if cost.serial(here, dtype) > cost.floor(here, dtype):
        found["share of serial bound"] = cost.serial(here, dtype) / seconds
    return {key: float(f"{value:.4g}") for key, value in found.items()}
