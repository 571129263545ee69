"""Who computes what an operator computes: our backends, and every other way that imports here, on the same arguments.

A contestant is a label and a call, or a label and the reason why it is absent.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timing import TOY
from torch import Tensor

import cogvx_kernels
from cogvx_kernels import use_backend
from cogvx_kernels._op import OPS

Contestant = tuple[str, Callable[[], Any] | str]
MATH_TOKENS = 4096  # with more, the scores of the plain formula fill the memory


def ours(name: str, args: Sequence[Any]) -> Iterator[Contestant]:
    """Each of our backends that is for this device, and the reference in eager mode."""
    yield "eager torch", partial(_on, "reference", name, args)
    for backend in OPS[name].backends:
        reason = OPS[name].why_not(backend, *args)
        yield backend, reason or partial(_on, backend, name, args)


def _on(backend: str, name: str, args: Sequence[Any]) -> Any:
    with use_backend(backend):
        return getattr(cogvx_kernels, name)(*args)


def others(name: str, args: Sequence[Any]) -> Iterator[Contestant]:
    """What PyTorch has of its own, the quick to compile before the slow."""
    if name in ("joint_attention", "int8_joint_attention"):
        yield from _attentions(*args[:3])
    elif name == "causal_conv3d":
        yield from _convolutions(*args)
    elif name in ("upsample_conv", "downsample_conv"):
        plain = (args[0].contiguous(), *args[1:])
        yield "cuDNN, contiguous", partial(OPS[name].reference.forward, *plain)
    elif name in ("group_norm_silu", "spatial_norm_silu"):
        plain = tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)
        yield "eager torch, contiguous", partial(OPS[name].reference.forward, *plain)


def compiled(name: str, args: Sequence[Any]) -> Iterator[Contestant]:
    """The reference under torch.compile, and attention that is made by it."""
    torch.compiler.reset()
    how = {"backend": "aot_eager"} if TOY else {}
    yield "torch.compile", partial(torch.compile(OPS[name].reference.forward, dynamic=False, **how), *args)
    if name == "joint_attention":
        yield "FlexAttention", _flex(*args[:3])


def _attentions(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Contestant]:
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError as error:
        yield "SDPA by backend", str(error)
        return
    for label, backend in (
        ("SDPA, flash", "FLASH_ATTENTION"),
        ("SDPA, cuDNN", "CUDNN_ATTENTION"),
        ("SDPA, efficient", "EFFICIENT_ATTENTION"),
        ("SDPA, math", "MATH"),
    ):
        if backend == "MATH" and q.shape[2] > MATH_TOKENS:
            yield label, f"skipped above {MATH_TOKENS} tokens: its scores would fill the memory"
        elif not hasattr(SDPBackend, backend):
            yield label, "this torch does not have it"
        else:
            yield label, partial(_attend, partial(sdpa_kernel, getattr(SDPBackend, backend)), q, k, v)


def _attend(chosen: Callable[[], AbstractContextManager], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with chosen():
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor] | str:
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError as error:
        return str(error)
    attend = flex_attention if TOY else torch.compile(flex_attention, dynamic=False)
    return lambda: attend(q, k, v).transpose(1, 2).flatten(2)


def _convolutions(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Iterator[Contestant]:
    """As a model without our buffers does it: the halo and the chunk are joined for every convolution."""
    num_halo = weight.shape[2] - 1
    padding = (0, weight.shape[3] // 2, weight.shape[4] // 2)

    def joined(halo: Tensor, chunk: Tensor, added: Tensor | None) -> Tensor:
        y = F.conv3d(torch.cat([halo, chunk], 2), weight, bias, padding=padding)
        return y if added is None else y.add_(added)

    for label, layout in (("channels last", torch.channels_last_3d), ("contiguous", torch.contiguous_format)):
        halo, chunk = (part.contiguous(memory_format=layout) for part in x.split([num_halo, x.shape[2] - num_halo], 2))
        added = None if residual is None else residual.contiguous(memory_format=layout)
        yield f"cuDNN, {label}, cat + conv", partial(joined, halo, chunk, added)
