"""What a call of an operator costs beside its kernel: checks, the choice of a backend, and torch's own dispatch.

Measured on the smallest call, most often an empty one, whose kernel is replaced by one that returns a result made
before: the difference of two long times would be their noise.
"""

import importlib
from time import thread_time
from types import SimpleNamespace

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
def test_a_dispatched_call_costs_little_more_than_its_kernel(benchmark, row, monkeypatch, name, mode):
    op, cases = OPS[name], importlib.import_module(f"cogvx_kernels.{name}.cases").SMALL
    args = min((case(device=DEVICE) for case in cases), key=lambda args: args[0].numel())
    args = tuple(
        channels_last(x) if torch.is_tensor(x) and x.dim() == 5 else x for x in args
    )  # as the models have them
    public, backend = getattr(cogvx_kernels, name), op.chosen(*args)
    module = op._module(backend)
    benchmark.group = f"dispatch ({DEVICE})"

    def seconds(call):  # of this thread, whatever else the machine does
        before = thread_time()
        for _ in range(CALLS):
            call(*args)
        return (thread_time() - before) / CALLS

    with mode():
        benchmark.pedantic(public, args, rounds=ROUNDS, iterations=CALLS, warmup_rounds=1)
        y = module.forward(*args)
        ready = SimpleNamespace(**vars(module) | {"forward": lambda *_: y})
        monkeypatch.setitem(op._modules, backend, ready)
        times = [(seconds(public), seconds(ready.forward)) for _ in range(ROUNDS)]
    dispatched, called = map(min, zip(*times, strict=True))
    cost = dispatched - called
    benchmark.extra_info |= {"µs over the kernel": round(cost * 1e6, 1)}
    figures = {"µs": f"{benchmark.stats.stats.min * 1e6:.1f}", "µs over the kernel": f"{cost * 1e6:.1f}"}
    row(benchmark.group, f"{name}, {mode.__name__}", **figures)
    assert cost <= MOST
