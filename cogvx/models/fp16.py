"""What fp16 cannot hold, 65504 and more, is computed in fp32, and that alone.

The released models of 5B were trained in bf16, whose range is that of fp32. In fp16 the residual stream, what a
sub-layer adds to it, the MLP's GELU, the timestep's modulation or the VAE's activations can overflow; an infinity in
any of them makes every later value NaN.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..finite import all_finite

LARGEST = torch.finfo(torch.float16).max


def overflowed(*values: Tensor) -> bool:
    """Whether any of these are fp16 and not finite."""
    return any(x.dtype == torch.float16 and not all_finite(x) for x in values)


def in_range(layer: nn.Module, x: Tensor, *rest: Any) -> Tensor:
    """`layer(x, *rest)`, of the dtype of x; for a layer in fp16 and a wider x in fp16 if that holds the result.

    If it does not, the layer is computed in the dtype of x, with its weights cast for that call.
    """
    if x.dtype == torch.float16 or not is_fp16(layer):
        return layer(x, *rest)
    y = layer(x.half(), *rest)
    return y.to(x.dtype) if all_finite(y) else widened(layer, x.dtype)(x, *rest)


def widened(layer: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    """A layer in fp16 as a function that computes in another dtype; any other layer as it is.

    The first argument is of that dtype already.
    """
    if not is_fp16(layer):
        return layer
    weights = {name: _cast(x, dtype) for name, x in chain(layer.named_parameters(), layer.named_buffers())}
    return lambda x, *rest: functional_call(layer, weights, (x, *(_cast(value, dtype) for value in rest)))


def is_fp16(layer: nn.Module) -> bool:
    """Whether a layer computes in fp16: weights in 8 bits say nothing of that."""
    return next((p.dtype for p in layer.parameters() if p.is_floating_point()), None) == torch.float16


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """fp16 tensors, also in tuples, in another dtype; all else as it is."""
    if isinstance(value, tuple):
        return tuple(_cast(part, dtype) for part in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float16 else value
