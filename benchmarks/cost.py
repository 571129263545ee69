"""What a call must cost at least: products, exponentials and bytes, and the time they take at the peaks of a machine.

Everything is counted from shapes, so tensors on the device meta will do: `of("joint_attention", args)` for an operator,
`of_model(lambda: block(...))` for whatever modules call. The floor is the slowest of three that may go on at the same
time: products at the rate of the best matrix product, exponentials at that of their unit, bytes at that of a copy.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import cogvx_kernels
from cogvx_kernels._op import OPS


@dataclass(frozen=True)
class Peaks:
    """The most that a machine was seen to do in a second."""

    copy: float  # bytes, read plus written
    products: Mapping[torch.dtype, float]  # operations of matrix products; torch.int8 among them
    exps: float = math.inf  # exponentials; infinite where ordinary arithmetic makes them, as on CPUs


@dataclass(frozen=True)
class Cost:
    flops: int = 0  # of floating-point products; a multiply-add is two
    int8_flops: int = 0
    exps: int = 0
    bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(self._parts(), other._parts(), strict=True)))

    def __mul__(self, times: float) -> "Cost":
        return Cost(*(round(part * times) for part in self._parts()))

    def _parts(self) -> tuple[int, ...]:
        return self.flops, self.int8_flops, self.exps, self.bytes

    def floor(self, peaks: Peaks, dtype: torch.dtype) -> float:
        """Seconds below which no implementation can come, products and exponentials and memory all at work at once."""
        return max(self._seconds_of_products(peaks, dtype), self.exps / peaks.exps, self.bytes / peaks.copy)

    def serial(self, peaks: Peaks, dtype: torch.dtype) -> float:
        """Seconds where exponentials wait for products, which is where the best public attention kernels stop."""
        return max(self._seconds_of_products(peaks, dtype) + self.exps / peaks.exps, self.bytes / peaks.copy)

    def _seconds_of_products(self, peaks: Peaks, dtype: torch.dtype) -> float:
        seconds = self.flops / peaks.products[dtype] if self.flops else 0.0
        return seconds + (self.int8_flops / peaks.products[torch.int8] if self.int8_flops else 0.0)


# What an operator computes beside passing its tensors through memory, from its arguments and its first result.
def _attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None, return_lse: bool, y: Tensor) -> Cost:
    batch, heads, tokens, width = q.shape
    pairs = batch * heads * sum(n * n for n in lengths or [tokens])
    return Cost(flops=4 * pairs * width, exps=pairs)


def _int8_attention(q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> Cost:
    whole = _attention(q, k, v, None, False, y)
    return Cost(flops=whole.flops // 2, int8_flops=whole.flops // 2, exps=whole.exps)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor) -> Cost:
    return Cost(flops=2 * weight.numel() * _pixels(y))


def _upsample(x: Tensor, weight: Tensor, bias: Tensor, double_time: bool, y: Tensor) -> Cost:
    # Of nine taps on doubled pixels five meet a pixel that another meets too, and equal frames are convolved once.
    return Cost(flops=2 * weight[..., :2, :2].numel() * 4 * _pixels(x))


def _downsample(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Cost:
    return Cost(flops=2 * weight.numel() * _pixels(y))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, y: Tensor) -> Cost:
    return Cost(flops=2 * x.numel() * len(weight), exps=y.numel() if gelu else 0)


def _silu(*args: Any) -> Cost:
    return Cost(exps=args[0].numel())


_COMPUTED: dict[str, Callable[..., Cost]] = {
    "joint_attention": _attention,
    "int8_joint_attention": _int8_attention,
    "causal_conv3d": _conv,
    "causal_conv3d_moments": _conv,
    "upsample_conv": _upsample,
    "downsample_conv": _downsample,
    "linear": _linear,
    "group_norm_silu": _silu,
    "spatial_norm_silu": _silu,
}
# The statistics of a chunk, which fits into no cache, must be known before its first value is written: where the last
# argument does not give its moments.
_READ_TWICE = ("group_norm_silu", "spatial_norm_silu")
# Products of the backward pass by those of the forward pass; attention computes its scores again.
_BACKWARD = {"joint_attention": 2.5}


def of(name: str, args: Sequence[Any], results: Any = None) -> Cost:
    """Of one call of an operator: every tensor read or written once."""
    args = _complete(name, args)
    results = _parts(_on_meta(name, args) if results is None else results)
    computed = _COMPUTED[name](*args, results[0]) if name in _COMPUTED else Cost()
    again = args[0].nbytes if name in _READ_TWICE and args[-1] is None else 0
    return computed + Cost(bytes=_bytes(args) + _bytes(results) + again)


def with_gradients(name: str, args: Sequence[Any]) -> Cost:
    """Of one call and the gradients of all its tensors."""
    args = _complete(name, args)
    results = _parts(_on_meta(name, args))
    forward = of(name, args, results)
    backward = Cost(forward.flops, forward.int8_flops, forward.exps) * _BACKWARD.get(name, 2)
    again = args[0].nbytes + _bytes(results) if name in _READ_TWICE else 0
    used = [x for argument, x in zip(OPS[name].arguments, args, strict=True) if argument not in OPS[name].added]
    return forward + backward + Cost(bytes=2 * _bytes(used) + _bytes(results) + again)


def bound(cost: Cost, peaks: Peaks, dtype: torch.dtype) -> str:
    """Which of the three the floor is."""
    seconds = {
        "products": cost._seconds_of_products(peaks, dtype),
        "exponentials": cost.exps / peaks.exps,
        "bytes": cost.bytes / peaks.copy,
    }
    return max(seconds, key=seconds.get)


@dataclass
class Count(TorchDispatchMode):
    """Adds up what everything called inside costs, by operator; of PyTorch's own operators products alone.

    A causal convolution that meets its weight for the first time is at the start of a clip, behind copies of the first
    frame, which need one product for all that a result takes of them.
    """

    by_operator: dict[str, Cost] = field(default_factory=dict)
    _met: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        if space == "aten" and func._overloadpacket not in flop_registry:
            with self:  # in inference mode some operators come whole, though they are made of others
                results = func.decompose(*args, **(kwargs or {}))
            if results is not NotImplemented:
                return results
        results = func(*args, **(kwargs or {}))
        if space == "cogvx" and name in OPS:
            found = of(name, args, results)
            if name.startswith("causal_conv3d") and id(args[1]) not in self._met:
                self._met.add(id(args[1]))
                found += Cost(flops=-_still_frames(args[1], _parts(results)[0]))
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=results)
            found = Cost(flops=flops, bytes=_bytes(args) + _bytes(_parts(results)))
        else:
            return results
        self.by_operator[name] = self.by_operator.get(name, Cost()) + found
        return results

    @property
    def total(self) -> Cost:
        return sum(self.by_operator.values(), Cost())


def of_model(call: Callable[[], object]) -> Cost:
    """Of everything that a call runs."""
    with torch.no_grad(), Count() as count:
        call()
    return count.total


def _still_frames(weight: Tensor, y: Tensor) -> int:
    """The products that copies of the first frame save: two of its three in the first result, one in the second."""
    if weight.shape[2] != 3:
        return 0
    return (2 + (y.shape[2] > 1)) * 2 * weight[:, :, 0].numel() * (_pixels(y) // y.shape[2])


def _on_meta(name: str, args: Sequence[Any]) -> Any:
    return getattr(torch.ops.cogvx, name)(*(x.to("meta") if isinstance(x, Tensor) else x for x in args))


def _complete(name: str, args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments with the defaults that a call left out."""
    call = inspect.signature(getattr(cogvx_kernels, name)).bind(*args)
    call.apply_defaults()
    return call.args


def _parts(y: Any) -> tuple[Tensor, ...]:
    return tuple(y) if isinstance(y, tuple | list) else (y,)


def _bytes(values: Sequence[Any]) -> int:
    return sum(x.numel() * x.element_size() for x in values if isinstance(x, Tensor))


def _pixels(x: Tensor) -> int:  # [B, C, T, H, W] -> B T H W
    return x.numel() // x.shape[1] if x.shape[1] else 0
