"""The stage `races`: each operator's kernels 250 times on the same arguments, forward and backward, bit for bit equal.

Between repeats the cache is flushed now and then and another stream keeps some multiprocessors busy, so that blocks run
in other orders; new memory is filled with NaN, so that a value that is read before it is written shows too.
"""

import importlib
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from timing import DEVICE, TOY, flush_cache, synchronize
from torch import Tensor

import cogvx_kernels
from cogvx_kernels import use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.testing import poisoned_memory

from .operators import toys, with_channels_last
from .record import Record, from_arguments

REPEATS = 3 if TOY else 250
# Many blocks of every kernel, yet short enough for so many repeats.
CALLS = {
    "joint_attention": ("2b, 4096 tokens", "2b, 4096 tokens, with lse"),
    "int8_joint_attention": ("2b, 4096 tokens",),
    "causal_conv3d": ("decoder, 512 at 60 x 90, second of a block",),
    "upsample_conv": ("decoder, 512 at 2 x 60 x 90",),
    "causal_conv3d_moments": ("decoder, 512 at 60 x 90, second of a block",),
    "group_norm_silu": ("encoder, 512 at 2 x 60 x 90",),
    "spatial_norm_silu": ("decoder, 512 at 2 x 60 x 90",),
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def main() -> None:
    record = from_arguments()
    record.put(repeats=REPEATS)
    for name, op in OPS.items():
        for label, backend in product(calls(name), op.backends):
            args = with_channels_last(name, calls(name)[label](dtype=torch.bfloat16, device=DEVICE))
            if op.why_not(backend, *args) is not None or not wanted(name, backend):
                continue
            if record.seconds_left() < 2:
                record.leave_out(f"{name}, {label}, {backend}")
                continue
            with use_backend(backend), poisoned_memory():
                repeat(record, name, label, backend, args)
    record.finish()
    raise SystemExit(1 if any(row["different"] for row in record.content["rows"]) else 0)


def wanted(name: str, backend: str) -> bool:
    """Kernels of the GPU; in a dry run those of the CPU, and one operator's of the interpreted ones, which are slow."""
    if TOY:
        return backend not in ("cuda", "triton") or name == "expert_layernorm"
    return backend in ("cuda", "triton")


def calls(name: str) -> dict[str, Callable[..., tuple]]:
    """The cases of an operator that are repeated."""
    module = importlib.import_module(f"cogvx_kernels.{name}.cases")
    if TOY:
        return toys(module)
    return {label: module.REAL[label] for label in CALLS.get(name) or [next(iter(module.REAL))]}


def repeat(record: Record, name: str, case: str, backend: str, args: tuple) -> None:
    """One row a pass: how many of the repeats were made, and how many of them differ from the first."""
    passes = [lambda: [y.detach() for y in results(name, args)]]
    if OPS[name].differentiable:
        passes.append(gradients_of(name, args))
    for label, call in zip(("forward", "backward"), passes, strict=False):
        first, made = [as_integers(y) for y in call()], 0
        different = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for made in range(1, REPEATS + 1):
            if made % 50 == 0:
                flush_cache()
            with disturbed(made):
                found = call()
            for a, b in zip(found, first, strict=True):
                different += (as_integers(a) != b).any()
            if made % 10 == 0:
                synchronize()  # so that the time that is left is that of the device too
            if record.seconds_left() < 1:
                break
        record.add(operator=name, case=case, by=backend, what=label, repeats=made, different=int(different))


def results(name: str, args: tuple) -> tuple[Tensor, ...]:
    y = getattr(cogvx_kernels, name)(*args)
    return y if isinstance(y, tuple) else (y,)


def gradients_of(name: str, args: tuple) -> Any:
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in args]
    wanted = [x for x in leaves if isinstance(x, Tensor)]
    y = results(name, leaves)
    generator = torch.Generator(DEVICE).manual_seed(1)
    grads = [torch.randn(part.shape, generator=generator, device=DEVICE).to(part) for part in y]
    return lambda: torch.autograd.grad(y, wanted, grads, retain_graph=True, allow_unused=True, materialize_grads=True)


def as_integers(x: Tensor) -> Tensor:
    """Its bits, so that NaN equals itself and 0 does not equal -0."""
    return x.contiguous().view(_INTEGERS[x.element_size()])


class disturbed:  # noqa: N801, it reads as what happens inside
    """Products of another stream run beside what is called inside, in some repeats and of another size in each."""

    def __init__(self, turn: int):
        self.turn = turn

    def __enter__(self) -> None:
        if DEVICE == "cuda" and self.turn % 2:
            size = 256 * (1 + self.turn % 7)
            with torch.cuda.stream(_other_stream()):
                a = torch.ones(size, size, device=DEVICE, dtype=torch.bfloat16)
                for _ in range(3):
                    a @ a

    def __exit__(self, *_: object) -> None:
        if DEVICE == "cuda":
            _other_stream().synchronize()


_streams: list[Any] = []


def _other_stream() -> Any:
    if not _streams:
        _streams.append(torch.cuda.Stream())
    return _streams[0]


def small_calls() -> Iterator[tuple[str, str, tuple]]:
    """Operator, backend and arguments of every small case of every kernel for this device."""
    for name, op in OPS.items():
        module = importlib.import_module(f"cogvx_kernels.{name}.cases")
        for backend in op.backends:
            for make in module.SMALL:
                for dtype in op.dtypes(backend):
                    args = make(dtype=dtype, device=DEVICE)
                    if op.why_not(backend, *args) is None:
                        yield name, backend, args


if __name__ == "__main__":
    main()
