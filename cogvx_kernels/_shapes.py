"""Checks of arguments; every message names the operator, the argument, what it takes and what it got."""

from torch import Tensor


def check_shape(op: str, argument: str, x: Tensor, **sizes: int | None) -> None:
    """ValueError unless x has exactly these dimensions, in this order; None takes any size.

    >>> check_shape("expert_layernorm", "shift", shift, B=2, experts=2, D=64)
    """
    shape = x.shape
    if shape == (*sizes.values(),):  # at once: this runs in every call
        return
    if len(shape) == len(sizes):
        for got, size in zip(shape, sizes.values(), strict=True):
            if size is not None and got != size:
                break
        else:
            return
    takes = ", ".join(name if size is None else f"{name}={size}" for name, size in sizes.items())
    raise ValueError(f"{op}: {argument} must be [{takes}], got {list(shape)}")


def check_value(op: str, argument: str, value: object, legal: bool, takes: str) -> None:
    """ValueError with what the argument takes, unless it is legal."""
    if not legal:
        raise ValueError(f"{op}: {argument} must be {takes}, got {value}")
