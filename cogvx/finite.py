"""Stops a computation that has left the finite numbers, and says where."""

import torch
from torch import Tensor, nn


class NonFiniteError(ArithmeticError):
    """A NaN or an infinity came out of a model; no video is made of it."""


def check_finite(output: Tensor, where: str, model: nn.Module, *inputs) -> None:
    """Raises NonFiniteError that names the first module of `model` whose output is not finite on these inputs.

    The check reads the output alone; the model runs a second time, watched, only when it has failed.
    """
    if torch.isfinite(output).all():
        return
    module = first_nonfinite_module(model, *inputs)
    raise NonFiniteError(
        f"a value that is not finite came out of {module} in {where} ({output.dtype}); "
        "no video was made. Try dtype=torch.bfloat16 or torch.float32, and check the weights with `cogvx verify`"
    )


def first_nonfinite_module(model: nn.Module, *inputs) -> str:
    """The name of the first submodule, in order of completion, that returns a value that is not finite."""
    found: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(x, Tensor) and not torch.isfinite(x).all() for x in outputs):
                found.append(name)

        return hook

    kind = type(model).__name__
    handles = [m.register_forward_hook(watch(f"{kind}.{name}".rstrip("."))) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else kind
