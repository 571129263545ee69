"""What every benchmark measures against: the copy bandwidth of the device it runs on, and plain PyTorch."""

import os
from collections.abc import Callable
from time import perf_counter

import pytest
import torch

from cogvx_kernels import use_backend
from cogvx_kernels._op import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE_NAME = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
# A CPU takes seconds for what a GPU does in a millisecond, so it gets a part of each real case.
TOKENS_ON_CPU = int(os.environ.get("COGVX_BENCH_TOKENS", "2048"))


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


@pytest.fixture
def measure(benchmark, copy_bandwidth) -> Callable[[str, str, Callable[[], object], int], object]:
    """`measure(group, backend, call, ideal_bytes)`: time a call on a backend, beside the others of its group."""

    def run(group: str, backend: str, call: Callable[[], object], ideal_bytes: int) -> object:
        benchmark.group = f"{group} ({DEVICE_NAME})"

        def synchronized() -> object:
            result = call()
            synchronize()
            return result

        with use_backend(backend):
            result = benchmark.pedantic(synchronized, rounds=20 if DEVICE == "cuda" else 5, warmup_rounds=2)
        rate = ideal_bytes / benchmark.stats.stats.median
        benchmark.extra_info |= {
            "device": DEVICE_NAME,
            "torch": torch.__version__,
            "GB/s": round(rate / 1e9, 2),
            "share of copy bandwidth": round(rate / copy_bandwidth, 3),
        }
        return result

    return run


def skip_unless_live(op: str, backend: str, *args: object) -> None:
    reason = OPS[op].why_not(backend, *args)
    if reason is not None:
        pytest.skip(reason)


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
