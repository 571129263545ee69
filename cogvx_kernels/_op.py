"""What turns a plain PyTorch function into a torch operator with faster backends.

An operator is its reference: a module whose `forward` gives the meaning, the fake (shape) kernel, the default gradient
and the fallback. A backend is a module named `_<backend>` beside it, with the same `forward`, and if it wants
`backward(*grads, *args)`, a gradient for each tensor argument, and `why_not(*args)`, the reason it cannot run or None.
One that is for some dtypes alone lists them as FOR_DTYPES, one that is for some shapes alone says which as FOR_SHAPES.
One that holds more than its result while it runs has `scratch(*args)`, which gives those tensors, made but not filled:
whoever plans the memory counts them, on tensors without memory too.
A backward with a keyword argument `needs` is told which of those gradients are wanted; None does for the others.

`torch.ops.cogvx.<name>` and `torch.ops.cogvx.<name>_backward` are opaque to torch.compile; the backend is chosen when
they run. An operator without backends is called as the plain function it is, so that torch.compile can fuse it.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor

OPS: dict[str, "Op"] = {}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_library = torch.library.Library("cogvx", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)
_forced: str | None = None  # process-wide, because gradients run in other threads

# What an argument may be, by its annotation; a traced integer is a torch.SymInt.
_KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    Tensor: ("a tensor", (Tensor,)),
    Tensor | None: ("a tensor or None", (Tensor, NoneType)),
    int: ("an integer", (int, torch.SymInt)),
    float: ("a number", (float, int, torch.SymFloat, torch.SymInt)),
    bool: ("a bool", (bool,)),
    list[int] | None: ("a list of integers or None", (list, NoneType)),
}


class Op:
    """One operator: call it, or reach it as `torch.ops.cogvx.<name>`.

    `backends` are in the order of preference. `check(*args)` raises ValueError for shapes and values that the formula
    does not cover. All tensors share one dtype, but those in `wide` may also be float32; under autocast they stay as
    they are and the others are cast to the low precision. Tensors in `added` are added to the first result, so that its
    gradient is theirs, which autograd passes on without a copy. Where it is not `differentiable`, asking for a gradient
    raises RuntimeError. `devices` names the types of devices that the backends are for; elsewhere, as without any
    backend, the call is the plain function, which torch.compile can fuse.
    """

    def __init__(
        self,
        name: str,
        reference: ModuleType,
        *backends: str,
        check: Callable[..., None],
        wide: tuple[str, ...] = (),
        added: tuple[str, ...] = (),
        differentiable: bool = True,
        devices: tuple[str, ...] | None = None,
    ):
        signature = inspect.signature(reference.forward)
        self.name, self.reference, self.backends, self.check = name, reference, backends, check
        self.differentiable, self.devices = differentiable, devices
        self.arguments, self.added = tuple(signature.parameters), added
        # From a backend's name to its module, or to the reason why that cannot be imported.
        self._modules: dict[str, ModuleType | str] = {"reference": reference}
        self._kinds = tuple((p.name, *_KINDS[p.annotation]) for p in signature.parameters.values())
        self._tensors = tuple(i for i, (_, _, kinds) in enumerate(self._kinds) if Tensor in kinds)
        self._wide = frozenset(self.arguments.index(argument) for argument in wide)
        self._added = frozenset(self.arguments.index(argument) for argument in added)
        self._register()
        OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        for (argument, expected, kinds), value in zip(self._kinds, args, strict=True):
            if not isinstance(value, kinds):
                raise ValueError(f"{self.name}: {argument} must be {expected}, got {type(value).__name__}")
        device = args[0].device.type
        if self.backends and (self.devices is None or device in self.devices):
            return self._run(*args) if self._is_eager(args, device) else self._overload(*args)
        self._check(args, device != "meta" and torch.is_autocast_enabled(device))
        return self.reference.forward(*args)

    def _is_eager(self, args: Sequence[Any], device: str) -> bool:
        """Whether nobody records, traces, casts, batches, profiles or intercepts this call.

        It then means the same without PyTorch's dispatcher, which costs about as much as a small kernel.
        """
        if torch.compiler.is_compiling():  # first, because what follows cannot be traced
            return False
        if device == "meta":  # for which nothing below has an answer
            return False
        if torch._C._len_torch_dispatch_stack() or torch._C._is_tracing() or torch.is_autocast_enabled(device):
            return False
        if torch.autograd.profiler._is_profiler_enabled or torch._C._functorch.peek_interpreter_stack() is not None:
            return False
        records = torch.is_grad_enabled()
        for i in self._tensors:
            x = args[i]
            if x is not None and (type(x) not in _PLAIN or (records and x.requires_grad)):
                return False
        return True

    def why_not(self, backend: str, *args: Any) -> str | None:
        """The reason why a backend cannot run on these arguments, or None."""
        if backend == "reference":
            return None
        module = self._module(backend)
        if isinstance(module, str):
            return module
        return module.why_not(*args) if hasattr(module, "why_not") else None

    def dtypes(self, backend: str) -> tuple[torch.dtype, ...]:
        """What a backend is for: its FOR_DTYPES, else every dtype of 32 bits or less."""
        return getattr(self._module(backend), "FOR_DTYPES", FLOATS[:3])

    def _module(self, backend: str) -> ModuleType | str:
        if backend not in self._modules:
            try:
                self._modules[backend] = importlib.import_module(f"{self.reference.__package__}._{backend}")
            except ImportError as error:  # triton is not installed, or the extension was not compiled
                self._modules[backend] = str(error)
        return self._modules[backend]

    def chosen(self, *args: Any) -> str:
        """The name of the backend that takes these arguments, "reference" where none does."""
        forced = _forced  # once: another thread may change it
        if forced == "reference" or forced in self.backends:
            return forced
        return next((backend for backend in self.backends if self.why_not(backend, *args) is None), "reference")

    def _choose(self, args: Sequence[Any]) -> ModuleType:
        forced = _forced
        is_forced = forced == "reference" or forced in self.backends
        backend = forced if is_forced else self.chosen(*args)
        reason = self.why_not(backend, *args) if is_forced else None
        if reason is not None:
            raise RuntimeError(f"{self.name}: backend {backend!r} cannot run here: {reason}")
        return self._module(backend)

    def _check(self, args: Sequence[Any], autocast: bool = False) -> None:
        first = args[0]
        dtype, device = first.dtype, first.device
        plain = dtype in FLOATS
        for i in self._tensors:
            x = args[i]
            if x is None or (plain and x.dtype is dtype and x.device == device):  # at once: this runs in every call
                continue
            if x.dtype not in FLOATS:
                raise ValueError(f"{self._at(i)} must be of a floating dtype, got {x.dtype}")
            if x.device != first.device:
                raise ValueError(f"{self._at(i)} must be on {first.device} like {self.arguments[0]}, got {x.device}")
            if x.dtype != first.dtype and not autocast and not (i in self._wide and x.dtype == torch.float32):
                raise ValueError(f"{self._at(i)} must be {first.dtype} like {self.arguments[0]}, got {x.dtype}")
        self.check(*args)

    def _at(self, i: int) -> str:
        return f"{self.name}: {self.arguments[i]}"

    def _register(self) -> None:
        schema = torch.library.infer_schema(self.reference.forward, mutates_args=())
        tags = (torch.Tag.pt2_compliant_tag,)
        _library.define(self.name + schema, tags=tags)
        self._overload = getattr(torch.ops.cogvx, self.name).default
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"cogvx::{self.name}", self._run_fake, lib=_library)
        for device in ("cpu", "cuda"):
            _library.impl(self.name, self._autocast(device), f"Autocast{device.upper()}")
        if self.differentiable:
            self._register_backward(schema[1 : schema.rindex(") ->")], tags)
        else:
            torch.library.register_autograd(f"cogvx::{self.name}", self._refuse_first, lib=_library)

    def _register_backward(self, arguments: str, tags: tuple[torch.Tag, ...]) -> None:
        backward = f"{self.name}_backward"
        # The gradients that are needed, in the order of the tensor arguments; `needs` has an entry for each of those.
        _library.define(f"{backward}(Tensor[] grads, bool[] needs, {arguments}) -> Tensor[]", tags=tags)
        self._backward_overload = getattr(torch.ops.cogvx, backward).default
        _library.impl(backward, self._run_backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"cogvx::{backward}", self._run_backward_fake, lib=_library)
        torch.library.register_autograd(
            f"cogvx::{self.name}", self._differentiate, setup_context=self._save, lib=_library
        )
        torch.library.register_autograd(f"cogvx::{backward}", self._refuse_second, lib=_library)
        for device in ("cpu", "cuda"):
            _library.impl(backward, self._autocast_backward(device), f"Autocast{device.upper()}")

    def _run(self, *args: Any) -> Any:
        self._check(args)
        y = self._choose(args).forward(*args)
        return tuple(_laid_out(part, args[0]) for part in y) if isinstance(y, tuple) else _laid_out(y, args[0])

    def _run_fake(self, *args: Any) -> Any:
        self._check(args)
        y = self.reference.forward(*args)
        return tuple(_empty(part, args[0]) for part in y) if isinstance(y, tuple) else _empty(y, args[0])

    def _run_backward(self, grads: list[Tensor], needs: list[bool], *args: Any) -> list[Tensor]:
        self._check(args)
        backend = self._choose(args)
        backward = getattr(backend, "backward", None) or getattr(self.reference, "backward", None)
        if backward is None:
            found = self._vjp(grads, needs, args)
        else:
            found = backward(*grads, *args, **({"needs": needs} if _takes_needs(backward) else {}))
        tensors = (args[i] for i in self._tensors)
        pairs = [(g, x) for g, x, need in zip(found, tensors, needs, strict=True) if need]
        return [_laid_out(g.clone() if any(g is grad for grad in grads) else g, x) for g, x in pairs]

    def _run_backward_fake(self, grads: list[Tensor], needs: list[bool], *args: Any) -> list[Tensor]:
        return [_empty(args[i], args[i]) for i, need in zip(self._tensors, needs, strict=True) if need]

    def _vjp(self, grads: list[Tensor], needs: list[bool], args: Sequence[Any]) -> list[Tensor | None]:
        """The gradients of the reference, which runs again."""
        leaves = list(args)
        for i, need in zip(self._tensors, needs, strict=True):
            leaves[i] = args[i].detach().requires_grad_() if need else args[i]
        wanted = [leaves[i] for i, need in zip(self._tensors, needs, strict=True) if need]
        # An operator may run below autograd (under a dispatch mode, say), where nothing would be recorded.
        below = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
        with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), below), torch.enable_grad():
            y = self.reference.forward(*leaves)
            pairs = zip(y if isinstance(y, tuple) else (y,), grads, strict=True)
            outputs, grads = zip(*((part, grad) for part, grad in pairs if part.requires_grad), strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True, materialize_grads=True))
        return [next(found) if need else None for need in needs]

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(None if i in self._added else inputs[i] for i in self._tensors))
        ctx.others = [None if i in self._tensors else value for i, value in enumerate(inputs)]

    def _differentiate(self, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        args = list(ctx.others)
        for i, x in zip(self._tensors, ctx.saved_tensors, strict=True):
            args[i] = x
        needs = [ctx.needs_input_grad[i] and i not in self._added for i in self._tensors]
        found = iter(self._backward_overload(list(grads), needs, *args) if any(needs) else ())
        passed = [grads[0] if i in self._added else None for i in range(len(args))]
        wanted = zip(passed, ctx.needs_input_grad, strict=True)
        return tuple((next(found) if grad is None else grad) if need else None for grad, need in wanted)

    def _refuse_first(self, ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{self.name} is for inference: it has no gradient")

    def _refuse_second(self, ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{self.name}: second derivatives are not supported")

    def _autocast(self, device: str) -> Callable[..., Any]:
        low = [i for i in self._tensors if i not in self._wide]

        def cast(*args: Any) -> Any:
            dtype, args = torch.get_autocast_dtype(device), list(args)
            for i in low:
                if args[i] is not None and args[i].dtype in FLOATS[:3]:
                    args[i] = args[i].to(dtype)
            with torch.autocast(device, enabled=False):
                return self._overload(*args)

        return cast

    def _autocast_backward(self, device: str) -> Callable[..., Any]:
        def as_they_are(*args: Any) -> Any:
            with torch.autocast(device, enabled=False):
                return self._backward_overload(*args)

        return as_they_are


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator that has it on one backend; operators without it are as before.

    The override holds for the whole process. Where the backend cannot run, a call raises RuntimeError with the reason.
    """
    global _forced
    if name not in declared_backends():
        raise ValueError(f"use_backend: name must be one of {', '.join(declared_backends())}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def explain(op: str | None = None, *args: Any) -> dict[str, dict[str, str]]:
    """For each operator its backends in the order of preference: "live", or the reason why not.

    Without arguments the answer is for a small call on the accelerator, or on the CPU where there is none.
    """
    if op is not None and op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)}, got {op!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    answer = {}
    for name in OPS if op is None else [op]:
        one = OPS[name]
        small = importlib.import_module(f"{one.reference.__package__}.cases").SMALL[0]
        calls = {backend: args or small(device=device, dtype=one.dtypes(backend)[0]) for backend in one.backends}
        answer[name] = {backend: one.why_not(backend, *call) or "live" for backend, call in calls.items()}
        answer[name]["reference"] = "live"
    return answer


def declared_backends() -> list[str]:
    """The names that `use_backend` takes."""
    return list(dict.fromkeys(["reference", *(backend for op in OPS.values() for backend in op.backends)]))


@functools.cache
def _takes_needs(backward: Callable[..., Any]) -> bool:
    return "needs" in inspect.signature(backward).parameters


def _memory_format(like: Tensor) -> torch.memory_format:
    channels_last = like.dim() == 5 and like.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if channels_last and not like.is_contiguous() else torch.contiguous_format


def _laid_out(y: Tensor, like: Tensor) -> Tensor:
    """y, copied where it is not dense in the memory format of `like`: real and fake results must agree on strides."""
    return y.contiguous(memory_format=_memory_format(like)) if y.dim() == 5 else y.contiguous()


def _empty(y: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=_memory_format(like) if y.dim() == 5 else torch.contiguous_format)
