"""What every benchmark measures against: the peaks of this machine (`timing`), the cost of a call, and plain PyTorch.

The process keeps what it frees, as the command line does (`cogvx.allocator`), because else most of what is measured
on a CPU are page faults of fresh tensors. COGVX_BENCH_ALLOCATOR=default leaves the allocator alone and remembers the
times, nothing else; the next run without it prints them beside its own. `make bench` runs both.

The table at the end holds what pytest-benchmark's own cannot: rates, their shares of what the machine can do, the
share of the floor below which no implementation can come (`cost`), and "x reference", how often a call fits into one
of plain PyTorch. For that the two run in turns and the median of the pairs is taken, so that a machine that slows down
slows both.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median

import pytest
import torch
from cost import Cost
from timing import DEVICE, DEVICE_NAME, flush_cache, shares, synchronize, times
from timing import seconds as seconds_of
from torch import Tensor

from cogvx.allocator import keep_freed_memory
from cogvx.machine import multiplies_bf16
from cogvx_kernels import use_backend
from cogvx_kernels._op import OPS, declared_backends
from cogvx_kernels.testing import assert_as_accurate

# A CPU takes seconds for what a GPU does in a millisecond, so it gets a part of each real case.
TOKENS_ON_CPU = int(os.environ.get("COGVX_BENCH_TOKENS", "2048"))
ROUNDS = 20 if DEVICE == "cuda" else 5
LONG, ROUNDS_IF_LONG = 1.0, 3  # seconds of a call on a CPU
ONCE = 60.0  # seconds of a reference beyond which a single pair is compared

# Without instructions for it, PyTorch multiplies in bf16 at a hundredth of the speed of fp32: what is made of products
# is then measured in fp32 alone (marker `products`), unless COGVX_BENCH_BF16=1 asks for it all the same.
NO_BF16 = DEVICE == "cpu" and not multiplies_bf16() and os.environ.get("COGVX_BENCH_BF16") != "1"
NARROW = torch.float32 if NO_BF16 else torch.bfloat16  # of benchmarks in one dtype

DEFAULT_ALLOCATOR = os.environ.get("COGVX_BENCH_ALLOCATOR") == "default"
ALLOCATOR = "default allocator" if DEFAULT_ALLOCATOR else (keep_freed_memory() or "freed memory is kept")
_REMEMBERED = "cogvx/default allocator"  # in pytest's cache: "group | backend" to milliseconds

_table: dict[str, dict[str, dict[str, str]]] = {}  # group, backend, column


def pytest_runtest_setup(item: pytest.Item) -> None:
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    if NO_BF16 and item.get_closest_marker("products") and torch.bfloat16 in parameters:
        pytest.skip("this CPU has no instructions for products in bf16; PyTorch would take minutes a call")


@pytest.fixture
def row() -> Callable[..., None]:
    """`row(group, backend, **figures)`: a line of the table that is printed at the end."""

    def add(group: str, backend: str, **figures: str) -> None:
        _table.setdefault(group, {})[backend] = figures

    return add


@pytest.fixture
def measure(benchmark, row, request) -> Callable[..., object]:
    """`measure(group, backend, call, cost=None, reference=None)`: time a call, return its result.

    `backend` is a backend of the operators, which then run on it, or any other name, and they run as they would.
    `reference` is what the call is compared with in turns: without one it is the same call on the backend reference.
    Products are compared with the peak of those in the dtype of the result. Backends may save products that the cost
    counts, as minimal filtering does, and then exceed a floor that is made of products.
    """

    def run(
        group: str,
        backend: str,
        call: Callable[[], object],
        cost: Cost | None = None,
        reference: Callable[[], object] | None = None,
    ) -> object:
        benchmark.group = f"{group} ({DEVICE_NAME}, {ALLOCATOR})"
        of_operators = backend in declared_backends()
        with use_backend(backend) if of_operators else nullcontext():
            call()
            rounds = ROUNDS if seconds_of(call) < LONG else ROUNDS_IF_LONG
            result = benchmark.pedantic(_synchronized(call), setup=flush_cache, rounds=rounds)
            seconds = times(call, ROUNDS).median if DEVICE == "cuda" else benchmark.stats.stats.median
        info = {"device": DEVICE_NAME, "allocator": ALLOCATOR, "torch": torch.__version__}
        if cost is not None:
            info |= shares(cost, seconds, _dtype(result))
        if not DEFAULT_ALLOCATOR and (reference is not None or (of_operators and backend != "reference")):
            info["x reference"] = round(_ratio(reference or call, call, backend if of_operators else None, rounds), 2)
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


def assert_gradients_agree(found: Sequence[Tensor], eager: Sequence[Tensor], grad: Tensor) -> None:
    """Of a convolution's input, weight and bias: those of a backend beside plain PyTorch's; both round long sums."""
    for one, other in zip(found[:2], eager[:2], strict=True):
        close = {torch.bfloat16: 5e-2, torch.float32: 2e-5}[one.dtype]
        assert (one.double() - other.double()).norm() <= close * other.double().norm()
    # Of the bias: sums of so many values of both signs that plain PyTorch's own error is larger than that.
    assert_as_accurate(found[2], eager[2], grad.double().sum((0, 2, 3, 4)), factor=3.0)


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


def _ratio(reference: Callable[[], object], call: Callable[[], object], backend: str | None, rounds: int) -> float:
    """The time of the reference over that of the call, the median of pairs that run one after the other."""
    ratios = []
    for _ in range(rounds + 1):
        with use_backend("reference"):
            slow = seconds_of(reference)
        with use_backend(backend) if backend else nullcontext():
            ratios.append(slow / seconds_of(call))
        if slow > ONCE:
            break
    return median(ratios[1:] or ratios)


def _dtype(result: object) -> torch.dtype:
    return result.dtype if torch.is_tensor(result) else _dtype(result[0])


def _synchronized(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        result = call()
        synchronize()
        return result

    return run
