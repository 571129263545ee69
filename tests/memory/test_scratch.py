"""What a backend declares as its scratch is what it allocates beside its result."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cogvx.memory.live import LiveBytes
from cogvx_kernels._op import OPS

SMALL_CHANGE = 2**10  # bytes: vectors of channels, that are read in another dtype
BACKENDS = [
    pytest.param(name, backend, marks=pytest.mark.soak if backend == "triton" else ())
    for name, op in OPS.items()
    for backend in op.backends
    if backend != "minimal"  # plain PyTorch, which is counted as it runs
]


def parts(y):
    return y if isinstance(y, tuple) else (y,)


def beside(call, args):
    """The most bytes that a call holds beside its arguments, and what it gives."""
    with LiveBytes() as live:
        live.hold(*(x for x in args if isinstance(x, torch.Tensor)))
        before = live.device.now
        y = call(*args)
        return live.device.peak - before, y


def dense_calls(name, backend):
    """The small cases, whose tensors the backend reads as they lie."""
    video = torch.contiguous_format if backend == "native" else torch.channels_last_3d

    def laid_out(argument, x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.contiguous(memory_format=video if x.dim() == 5 and argument != "weight" else torch.contiguous_format)

    for dtype in OPS[name].dtypes(backend)[:2]:
        for case in importlib.import_module(f"cogvx_kernels.{name}.cases").SMALL:
            args = case(dtype=dtype)
            if OPS[name].why_not(backend, *args) is None and args[0].numel():
                yield tuple(map(laid_out, OPS[name].arguments, args))


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_it_is_what_is_allocated(name, backend, run_on):
    case = importlib.import_module(f"cogvx_kernels.{name}.cases").SMALL[0]
    run_on(name, backend, *case(dtype=OPS[name].dtypes(backend)[0]))
    module = OPS[name]._module(backend)
    for args in dense_calls(name, backend):
        allocated, y = beside(module.forward, args)
        allocated -= sum(part.nbytes for part in parts(y))
        declared = beside(module.scratch, args)[0] if hasattr(module, "scratch") else 0
        what = f"{[getattr(x, 'shape', x) for x in args]} {args[0].dtype}: allocated {allocated}, declared {declared}"
        assert abs(allocated - declared) <= 0.1 * allocated + SMALL_CHANGE, what


def test_a_fake_run_counts_it():
    """Of the fully connected layer on CPUs, which packs its weight."""
    sizes = (1, 100, 512), (1024, 512)
    if OPS["linear"].why_not("native", *map(torch.empty, sizes), None, False):
        pytest.skip("the extension is not compiled")
    with FakeTensorMode(), LiveBytes("cpu") as live:
        x, weight = map(torch.empty, sizes)
        before = live.device.now
        y = torch.ops.cogvx.linear(x, weight, None, False)
    assert live.device.peak >= before + y.nbytes + weight.nbytes
