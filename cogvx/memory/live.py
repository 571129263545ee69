"""Counts the bytes that tensors hold while code runs, on real tensors or on fake ones that hold none.

A fake run says what a real one would hold, from shapes alone and in seconds. Our operators are opaque to PyTorch; here
a backend of plain PyTorch is run in the place of its operator, so that what it holds inside counts too, and a compiled
one adds the tensors that it declares as its `scratch`. Whoever asks a fake tensor for a value gets the answer of a
healthy run: numbers are finite, frames differ.
"""

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

from cogvx_kernels._extension import built_with
from cogvx_kernels._op import OPS

from ..host import in_host_memory

PLAIN = ("reference", "minimal")  # backends that are plain PyTorch
COMPOSITE = "CompositeImplicitAutograd"
ONEDNN_FROM = 20480  # PyTorch's rule: the product of the first four sizes of an input of batch 1
COMPILED = {"cpu": ("native",), "cuda": ("cuda", "triton")}


# What an operator holds, and the tensor that it gives, for shapes that it was run on: most of a model is repetition.
_KNOWN: dict[tuple, tuple[int, tuple]] = {}


@dataclass
class Tally:
    """Bytes of one memory."""

    now: int = 0
    peak: int = 0

    def add(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes("cuda") as live: ...`, then `live.device.peak` and `live.host.peak`, in bytes.

    target: the type of device whose backends a fake run stands for.
    """

    def __init__(self, target: str = "cpu"):
        super().__init__()
        self.target, self.device, self.host = target, Tally(), Tally()
        self._known: dict[weakref.ref, tuple[Tally, int]] = {}

    def start_peak(self) -> None:
        """Forget the peaks so far."""
        for tally in (self.device, self.host):
            tally.peak = tally.now

    def hold(self, *held: nn.Module | Tensor) -> None:
        """Count the weights of modules, and tensors, from now on, as if they were made here."""
        for each in held:
            self._see([each] if isinstance(each, Tensor) else [*each.parameters(), *each.buffers()])

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # it is made of other tensors, in whose operations it comes here again
        name = func._schema.name
        fake = any(isinstance(x, FakeTensor) for x in args if isinstance(x, Tensor))
        if fake and name == "aten::_local_scalar_dense":
            return True
        if fake and name == "aten::equal":
            return False
        if fake and name.startswith("cogvx::") and name.removeprefix("cogvx::") in OPS:
            return self._run_operator(func, args)
        if name.startswith("aten::") and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
            with self:  # what it is made of may hold more than its result
                return func.decompose(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if fake and name == "aten::convolution" and self.target == "cpu":
            self._pass(columns(*args))
        self._see(x for x in tree_leaves(result) if isinstance(x, Tensor))
        return result

    def _run_operator(self, func: Any, args: tuple) -> Any:
        op = OPS[func._schema.name.removeprefix("cogvx::")]
        args = (*args, *(argument.default_value for argument in func._schema.arguments[len(args) :]))
        backend = self._backend(op, args)
        key = self.target, op.name, backend, *map(_shape, args)
        if key not in _KNOWN or in_host_memory():
            before, peak = self.device.now, self.device.peak
            self.device.peak = before
            result = self._run_backend(func, op._module(backend), args, backend)
            inside, self.device.peak = self.device.peak - before, max(peak, self.device.peak)
            if isinstance(result, Tensor) and not in_host_memory() and self._is_new(result, args):
                _KNOWN[key] = inside, _shape(result)
            return result
        inside, (size, stride, dtype) = _KNOWN[key]
        result = torch.empty_strided(size, stride, dtype=dtype, device=args[0].device)
        self._pass(inside)
        self._see([result])
        return result

    def _run_backend(self, func: Any, module: Any, args: tuple, backend: str) -> Any:
        if backend in PLAIN:
            with self:
                return module.forward(*args)
        result = func(*args)
        self._see(x for x in tree_leaves(result) if isinstance(x, Tensor))
        if hasattr(module, "scratch") and built_with()["missing"] is None:  # where sizes are asked for
            with self:
                module.scratch(*args)
        return result

    @staticmethod
    def _is_new(result: Tensor, args: tuple) -> bool:
        """Whether a result has memory of its own, no more than it needs."""
        storage = result.untyped_storage()
        mine = storage.nbytes() == result.nbytes and result.storage_offset() == 0
        return mine and all(a.untyped_storage()._cdata != storage._cdata for a in args if isinstance(a, Tensor))

    def _pass(self, count: int) -> None:
        """Bytes that were held beside the result of an operator, and are free again."""
        self.device.add(count)
        self.device.add(-count)

    def _backend(self, op: Any, args: tuple) -> str:
        """What would run on the target, where all that is compiled for it is there."""
        if op.devices is not None and self.target not in op.devices:
            return "reference"
        if self.target == "cpu":
            usable = [b for b in op.backends if b in (*PLAIN, "native") and op.why_not(b, *args) is None]
            return usable[0] if usable else "reference"
        compiled = [b for b in op.backends if b in COMPILED[self.target]]
        low = args[0].dtype in (torch.bfloat16, torch.float16)
        fitting = [b for b in compiled if b != "cuda" or low or args[0].dtype in op.dtypes(b)]
        return fitting[0] if fitting else "reference"

    def _see(self, found: Iterable[Tensor]) -> None:
        for tensor in found:
            if is_traceable_wrapper_subclass_type(type(tensor)):  # without memory of its own
                continue
            storage = tensor.untyped_storage()
            key = weakref.ref(storage, self._forget)
            if key in self._known or not storage.nbytes():
                continue
            tally = self.host if in_host_memory() else self.device
            self._known[key] = tally, storage.nbytes()
            tally.add(storage.nbytes())

    def _forget(self, key: weakref.ref) -> None:
        tally, count = self._known.pop(key, (self.device, 0))
        tally.add(-count)


def _shape(value: Any) -> Any:
    return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else repr(value)


def columns(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> int:
    """Bytes that PyTorch's own convolution on a CPU unfolds its input into, where oneDNN does not convolve."""
    if len(x) > 1 or x.shape[:4].numel() > ONEDNN_FROM or weight.shape[2:].numel() == 1:
        return 0
    stride, padding = others[0], others[1]
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    pixels = math.prod((n + 2 * pad - taps) // step + 1 for n, taps, step, pad in sizes)
    return weight[0].numel() * pixels * x.itemsize
