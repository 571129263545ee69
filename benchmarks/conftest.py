"""What every benchmark measures against: the copy bandwidth and the matrix products of this machine, and plain PyTorch.

The process keeps what it frees, as the command line does (`cogvx.allocator`), because else most of what is measured
on a CPU are page faults of fresh tensors. COGVX_BENCH_ALLOCATOR=default leaves the allocator alone and remembers the
times; the next run without it prints them beside its own. `make bench` runs both. The table at the end holds what
pytest-benchmark's own cannot: rates, their shares of what the machine can do, and "x reference", how often a call fits
into one of plain PyTorch. For that the two run in turns and the median of the pairs is taken, so that a machine that
slows down slows both.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F

from cogvx.allocator import keep_freed_memory
from cogvx_kernels import use_backend
from cogvx_kernels._op import OPS, declared_backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE_NAME = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
# A CPU takes seconds for what a GPU does in a millisecond, so it gets a part of each real case.
TOKENS_ON_CPU = int(os.environ.get("COGVX_BENCH_TOKENS", "2048"))
ROUNDS = 20 if DEVICE == "cuda" else 5

DEFAULT_ALLOCATOR = os.environ.get("COGVX_BENCH_ALLOCATOR") == "default"
ALLOCATOR = "default allocator" if DEFAULT_ALLOCATOR else (keep_freed_memory() or "freed memory is kept")
_REMEMBERED = "cogvx/default allocator"  # in pytest's cache: "group | backend" to milliseconds

_table: dict[str, dict[str, dict[str, str]]] = {}  # group, backend, column


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes read plus written a second by a copy too large for any cache: the most that a kernel can stream."""
    source = torch.randn(2**28 if DEVICE == "cuda" else 2**24, device=DEVICE)
    target = torch.empty_like(source).copy_(source)
    times = [_seconds(lambda: target.copy_(source)) for _ in range(10)]
    return 2 * source.nbytes / min(times)


@pytest.fixture(scope="session")
def matmul_peak() -> Callable[[torch.dtype], float]:
    """`matmul_peak(dtype)`: operations a second of the best large product, by a matrix or by a 1 × 1 convolution.

    On CPUs the two reach different libraries, of which either can be twice as fast as the other.
    """
    found: dict[torch.dtype, float] = {}
    size = 8192 if DEVICE == "cuda" else 2048

    def peak(dtype: torch.dtype) -> float:
        if dtype not in found:
            a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
            x = a.reshape(1, 32, size // 32, size).permute(0, 3, 1, 2)  # channels last
            weight = b.reshape(size, size, 1, 1).contiguous(memory_format=torch.channels_last)
            calls = (lambda: a @ b), (lambda: F.conv2d(x, weight))
            times = [_seconds(call) for call in calls for _ in range(ROUNDS + 1)]
            found[dtype] = 2 * size**3 / min(times)
        return found[dtype]

    return peak


@pytest.fixture
def row() -> Callable[..., None]:
    """`row(group, backend, **figures)`: a line of the table that is printed at the end."""

    def add(group: str, backend: str, **figures: str) -> None:
        _table.setdefault(group, {})[backend] = figures

    return add


@pytest.fixture
def measure(benchmark, row, copy_bandwidth, matmul_peak, request) -> Callable[..., object]:
    """`measure(group, backend, call, ideal_bytes=None, flops=None, reference=None)`: time a call, return its result.

    `backend` is a backend of the operators, which then run on it, or any other name, and they run as they would.
    `reference` is what the call is compared with in turns: without one it is the same call on the backend reference.
    The share of the peak of `flops` is that of products in the dtype of the result.
    """

    def run(
        group: str,
        backend: str,
        call: Callable[[], object],
        ideal_bytes: int | None = None,
        flops: float | None = None,
        reference: Callable[[], object] | None = None,
    ) -> object:
        benchmark.group = f"{group} ({DEVICE_NAME}, {ALLOCATOR})"
        of_operators = backend in declared_backends()
        with use_backend(backend) if of_operators else nullcontext():
            result = benchmark.pedantic(_synchronized(call), rounds=ROUNDS, warmup_rounds=2)
        seconds = benchmark.stats.stats.median
        info = {"device": DEVICE_NAME, "allocator": ALLOCATOR, "torch": torch.__version__}
        if ideal_bytes is not None:
            info["GB/s"] = round(ideal_bytes / seconds / 1e9, 2)
            info["share of copy bandwidth"] = round(ideal_bytes / seconds / copy_bandwidth, 3)
        if flops is not None:
            info["TFLOP/s"] = round(flops / seconds / 1e12, 3)
            info["share of matmul peak"] = round(flops / seconds / matmul_peak(_dtype(result)), 3)
        if reference is not None or (of_operators and backend != "reference"):
            info["x reference"] = round(_ratio(reference or call, call, backend if of_operators else None), 2)
        benchmark.extra_info |= info
        figures = {"ms": f"{seconds * 1e3:.3f}"}
        for key, value in info.items():
            if isinstance(value, float):
                figures[key] = f"{value:.0%}" if key.startswith("share") else f"{value:.4g}"
        figures |= _milliseconds_by_default(request.config, benchmark.group, backend, seconds)
        row(benchmark.group, backend, **figures)
        return result

    return run


def pytest_terminal_summary(terminalreporter) -> None:
    for group, rows in _table.items():
        columns = list(dict.fromkeys(column for figures in rows.values() for column in figures))
        cells = [["", *columns]] + [[name, *(figures.get(c, "") for c in columns)] for name, figures in rows.items()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        terminalreporter.section(group, sep="-")
        for name, *others in cells:
            padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            terminalreporter.write_line("  ".join([name.ljust(widths[0]), *padded]))


def skip_unless_live(op: str, backend: str, *args: object) -> None:
    reason = OPS[op].why_not(backend, *args)
    if reason is not None:
        pytest.skip(reason)


def _milliseconds_by_default(config: pytest.Config, group: str, backend: str, seconds: float) -> dict[str, str]:
    """A run with the default allocator remembers its time; another shows and forgets what was remembered."""
    key = f"{group.replace(ALLOCATOR, '')} | {backend}"
    remembered = config.cache.get(_REMEMBERED, {})
    if DEFAULT_ALLOCATOR:
        config.cache.set(_REMEMBERED, remembered | {key: seconds * 1e3})
        return {}
    before = remembered.pop(key, None)
    config.cache.set(_REMEMBERED, remembered)
    return {} if before is None else {"ms, default allocator": f"{before:.3f}"}


def _ratio(reference: Callable[[], object], call: Callable[[], object], backend: str | None) -> float:
    """The time of the reference over that of the call, the median of pairs that run one after the other."""
    ratios = []
    for _ in range(ROUNDS + 1):
        with use_backend("reference"):
            slow = _seconds(reference)
        with use_backend(backend) if backend else nullcontext():
            ratios.append(slow / _seconds(call))
    return median(ratios[1:])


def _dtype(result: object) -> torch.dtype:
    return result.dtype if torch.is_tensor(result) else _dtype(result[0])


def _synchronized(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        result = call()
        synchronize()
        return result

    return run


def _seconds(call: Callable[[], object]) -> float:
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
