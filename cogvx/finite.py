"""Stops a computation that has left the finite numbers, and says where."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class NonFiniteError(ArithmeticError):
    """A NaN or an infinity came out of a model; no video is made of it."""


def check_finite(output: Tensor, where: str, model: nn.Module, run: Callable[[], object]) -> None:
    """Raises NonFiniteError that names the module of `model` where the finite numbers were left.

    The check reads the output alone; only when that fails, `run` repeats the computation, watched module by module.
    """
    if all_finite(output):
        return
    module = first_nonfinite_module(model, run)
    weights = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if weights:
        more = f" and {len(weights) - 1} more weights are" if len(weights) > 1 else " is"
        advice = f"{weights[0]}{more} not finite: `cogvx verify` checks a checkpoint"
    else:
        advice = "the weights are finite: try dtype=torch.float32 or torch.bfloat16, or a lower guidance_scale"
    raise NonFiniteError(
        f"a value that is not finite came out of {module} in {where} ({output.dtype}); nothing was made; {advice}"
    )


def first_nonfinite_module(model: nn.Module, run: Callable[[], object]) -> str:
    """The first submodule, in order of completion, that makes a value that is not finite of finite ones.

    Some modules hold weights that their parents compute with; then it is the parent.
    """
    culprits: list[str] = []
    spread: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            if not culprits and not all_finite(*tensors(output)):
                (culprits if all_finite(*tensors(args)) else spread).append(name)

        return hook

    kind = type(model).__name__
    handles = [m.register_forward_hook(watch(f"{kind}.{name}".rstrip("."))) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return (culprits or spread or [kind])[0]


def all_finite(*values: Tensor) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in values)


def tensors(value: object) -> Iterable[Tensor]:
    """The tensors in a module's arguments or results."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [x for part in value.values() for x in tensors(part)]
    return [x for part in value for x in tensors(part)] if isinstance(value, tuple | list) else []
