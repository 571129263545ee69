"""The stage `operators`: every operator at the sizes of 2B and 5B, by every way that imports, as a share of its floor.

Each result is checked before it is timed. First come our backends beside eager PyTorch, then what else PyTorch has,
then our gradients, and last what torch.compile makes, which takes the longest to begin.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import cost
import interpreter
import torch
from timing import DEVICE, TOY, shares, times
from torch import Tensor

import cogvx_kernels
from cogvx.machine import peak_of_tensors
from cogvx_kernels import use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.testing import assert_as_accurate, poisoned_memory

from . import baselines
from .record import Record, from_arguments

DTYPE = torch.bfloat16
ORDER = ("joint_attention", "causal_conv3d", "gated_expert_layernorm", "qk_norm_rope", "spatial_norm_silu",
         "int8_joint_attention", "upsample_conv", "downsample_conv", "expert_layernorm", "group_norm_silu",
         "linear")  # fmt: skip
LEAST_SECONDS = 2.0  # left to a stage, below which nothing new begins


@dataclass(frozen=True)
class Case:
    operator: str
    label: str
    make: Callable[..., tuple]

    def arguments(self) -> tuple:
        return with_channels_last(self.operator, self.make(dtype=DTYPE, device=DEVICE))


def with_channels_last(name: str, args: Sequence[Any]) -> tuple:
    """The arguments as the models have them: video, and what is added to it, with its channels last."""
    video = {OPS[name].arguments[0], *OPS[name].added} if args[0].dim() == 5 else ()
    pairs = zip(OPS[name].arguments, args, strict=False)  # what has a default may be left out
    return tuple(
        x.contiguous(memory_format=torch.channels_last_3d) if argument in video and x is not None else x
        for argument, x in pairs
    )


def cases() -> list[Case]:
    """In the order of their share of a video; those of larger models than 5B are left out."""
    found = []
    for name in (*ORDER, *sorted(set(OPS) - set(ORDER))):
        module = importlib.import_module(f"cogvx_kernels.{name}.cases")
        if TOY:
            found += [Case(name, label, make) for label, make in toys(module).items()]
        else:
            found += [Case(name, label, make) for label, make in module.REAL.items() if not label.startswith("1.5")]
    return found


def toys(module: ModuleType) -> dict[str, Callable[..., tuple]]:
    """Small cases of an operator: the first, and the first that asks for lse where one does."""
    with_lse = [make for make in module.SMALL if make.keywords.get("return_lse")]
    return dict(zip(("toy", "toy, with lse"), (module.SMALL[0], *with_lse), strict=False))


def main() -> None:
    record = from_arguments()
    interpreter.hasten()
    record.put(dtype=str(DTYPE))
    for contestants in (baselines.ours, baselines.others):
        each(record, lambda case, args, find=contestants: forward(record, case, args, find(case.operator, args)))
    few = 3 if TOY else None
    each(record, lambda case, args: gradients(record, case, args), few)
    each(record, lambda case, args: forward(record, case, args, baselines.compiled(case.operator, args)), few)
    record.finish()
    wrong = [row for row in record.content["rows"] if "wrong" in row]
    raise SystemExit(1 if wrong else 0)


def each(record: Record, run: Callable[[Case, tuple], None], at_most: int | None = None) -> None:
    for case in cases()[:at_most]:
        if record.seconds_left() < LEAST_SECONDS:
            record.leave_out(f"{case.operator}, {case.label}")
            continue
        run(case, case.arguments())
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


@torch.no_grad()
def forward(record: Record, case: Case, args: tuple, contestants: Iterator[baselines.Contestant]) -> None:
    checks, least = Checks(case.operator, args), cost.of(case.operator, args)
    for label, call in contestants:
        row = {"operator": case.operator, "case": case.label, "by": label, "pass": "forward"}
        if record.seconds_left() < LEAST_SECONDS:
            record.leave_out(f"{case.operator}, {case.label}, {label}")
        elif isinstance(call, str):
            record.add(**row, absent=call)
        else:
            try:
                if label in OPS[case.operator].backends:
                    with poisoned_memory():
                        checks.check(call())
                else:
                    checks.check(call())
                record.add(**row, **measured(call, least))
            except AssertionError as error:
                record.add(**row, wrong=str(error)[:500])
            except Exception as error:  # whatever others raise where they cannot
                key = "wrong" if label in OPS[case.operator].backends else "absent"
                record.add(**row, **{key: f"{type(error).__name__}: {error}"[:300]})
                if "CUDA error" in str(error):  # after which nothing runs in this process
                    raise


def gradients(record: Record, case: Case, args: tuple) -> None:
    """Of our backends and of eager PyTorch; how right they are, the tests say."""
    if not OPS[case.operator].differentiable:
        return
    least = cost.with_gradients(case.operator, args)
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in args]
    wanted = [x for x in leaves if isinstance(x, Tensor)]

    def run() -> Any:
        y = getattr(cogvx_kernels, case.operator)(*leaves)
        y = y if isinstance(y, tuple) else (y,)
        return torch.autograd.grad(y, wanted, [torch.ones_like(part) for part in y], allow_unused=True)

    for backend in ("reference", *OPS[case.operator].backends):
        row = {"operator": case.operator, "case": case.label, "by": backend, "pass": "forward and backward"}
        if OPS[case.operator].why_not(backend, *args) is not None:
            continue
        if record.seconds_left() < LEAST_SECONDS:
            record.leave_out(f"{case.operator}, {case.label}, gradients by {backend}")
            continue
        try:
            with use_backend(backend):
                record.add(**row, **measured(run, least))
        except Exception as error:  # memory, most of all
            record.add(**row, **{"absent" if backend == "reference" else "wrong": f"{error}"[:300]})


def measured(call: Callable[[], Any], least: cost.Cost) -> dict[str, Any]:
    """Time, rates, shares and the memory that tensors took at most."""
    if not TOY:
        for _ in range(2):
            call()
    found = times(call, 2 if TOY else 20, at_most=0.4)
    row = {"ms": found.median * 1e3, "iqr, ms": found.iqr * 1e3, "rounds": found.rounds}
    if DEVICE == "cuda":
        row["peak, MB"] = round(peak_of_tensors(call, torch.device(DEVICE)) / 1e6, 1)
    return row | shares(least, found.median, DTYPE)


class Checks:
    """Whether a result is as accurate as eager PyTorch, on a part of it that float64 can afford."""

    def __init__(self, name: str, args: tuple):
        self.name = name
        few, self.part = _part(name, args)
        reference = OPS[name].reference.forward
        self.exact = self.part_of(reference(*(x.double() if isinstance(x, Tensor) else x for x in few)))
        self.eager = self.part_of(reference(*few))
        if name == "int8_joint_attention":
            self.exact = self.part_of(OPS["joint_attention"].reference.forward(*(x.double() for x in few), None, False))

    def part_of(self, y: Any) -> list[Tensor]:
        return [self.part(i, one) for i, one in enumerate(_filled(y))]

    def check(self, y: Any) -> None:
        every = _filled(y)
        for i, (whole, one) in enumerate(zip(every, self.part_of(y), strict=True)):
            if not bool(whole.isfinite().all()):
                raise AssertionError(f"result {i} is not finite everywhere")
            if self.name == "int8_joint_attention":
                distance = ((one.double() - self.exact[i]).norm() / self.exact[i].norm()).item()
                if not distance <= 2e-2:
                    raise AssertionError(f"result {i} is {distance:.3g} from exact attention")
            else:
                assert_as_accurate(one, self.eager[i], self.exact[i], what=f"result {i}")


def _filled(y: Any) -> list[Tensor]:
    """The results that were asked for: of others there is nothing."""
    return [one for one in (y if isinstance(y, tuple) else (y,)) if one.numel()]


def _part(name: str, args: Sequence[Any]) -> tuple[tuple, Callable[[int, Tensor], Tensor]]:
    """Arguments of a smaller call, and what part of result i of both must then agree."""
    if name in ("joint_attention", "int8_joint_attention"):
        width = args[0].shape[-1]
        return (*(x[:1, :1] for x in args[:3]), *args[3:]), lambda i, y: y[:1, :1] if i else y[:1, :, :width]
    if name == "causal_conv3d":
        x, weight, bias, residual = args
        few = x[..., :9, :9], weight, bias, None if residual is None else residual[..., :9, :9]
        return few, lambda _, y: y[..., :8, :8]
    if name == "upsample_conv":
        return (args[0][..., :9, :9], *args[1:]), lambda _, y: y[..., :16, :16]
    if name == "downsample_conv":
        return (args[0][..., :16, :16], *args[1:]), lambda _, y: y[..., :7, :7]
    return tuple(args), lambda _, y: y


if __name__ == "__main__":
    main()
