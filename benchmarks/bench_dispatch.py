"""What a call of an operator costs beside its kernel: checks, the choice of a backend, and torch's own dispatch.

Measured on the smallest call, most often an empty one: the difference of two long times would be their noise.
"""

import importlib
from time import thread_time

import pytest
import torch
from conftest import DEVICE

import cogvx_kernels
from cogvx_kernels._op import OPS

CALLS, ROUNDS = 200, 60
MOST = 25e-6  # seconds


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.backends])
def test_a_dispatched_call_costs_little_more_than_its_kernel(benchmark, row, name, mode):
    op, cases = OPS[name], importlib.import_module(f"cogvx_kernels.{name}.cases").SMALL
    args = min((case(device=DEVICE) for case in cases), key=lambda args: args[0].numel())
    args = tuple(
        channels_last(x) if torch.is_tensor(x) and x.dim() == 5 else x for x in args
    )  # as the models have them
    public, bare = getattr(cogvx_kernels, name), op._choose(args).forward
    benchmark.group = f"dispatch ({DEVICE})"

    def seconds(call):  # of this thread, whatever else the machine does
        before = thread_time()
        for _ in range(CALLS):
            call(*args)
        return (thread_time() - before) / CALLS

    with mode():
        benchmark.pedantic(public, args, rounds=ROUNDS, iterations=CALLS, warmup_rounds=1)
        times = [(seconds(public), seconds(bare)) for _ in range(ROUNDS)]
    dispatched, kernel = map(min, zip(*times, strict=True))
    cost = dispatched - kernel
    benchmark.extra_info |= {"µs over the kernel": round(cost * 1e6, 1)}
    figures = {"µs": f"{dispatched * 1e6:.1f}", "µs of the kernel": f"{kernel * 1e6:.1f}", "over": f"{cost * 1e6:.1f}"}
    row(benchmark.group, f"{name}, {mode.__name__}", **figures)
    assert cost <= MOST
