"""`causal_conv3d_moments`, alone and before the norm that takes its moments, beside what PyTorch has of its own."""

from collections.abc import Callable

import cost
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, NARROW, skip_unless_live
from torch import Tensor

from cogvx_kernels import causal_conv3d, causal_conv3d_moments, group_norm_silu, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.causal_conv3d_moments.cases import REAL
from cogvx_kernels.testing import assert_as_accurate

pytestmark = pytest.mark.products

PYTORCH = "PyTorch, channels last"
BACKENDS = OPS["causal_conv3d_moments"].backends
GROUPS, EPS = 32, 1e-6


def arguments(label: str) -> tuple:
    real = REAL[label]
    size = real.args if DEVICE == "cuda" else (*real.args[:3], 1, 24, 40)
    x, weight, bias, residual = real.func(*size, **real.keywords, dtype=NARROW, device=DEVICE)
    x, residual = (t if t is None else t.contiguous(memory_format=torch.channels_last_3d) for t in (x, residual))
    return x, weight, bias, residual


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """By cuDNN or oneDNN, in the same dtype and memory format."""
    y = F.conv3d(x, weight, bias, padding=(0, weight.shape[3] // 2, weight.shape[4] // 2))
    return y if residual is None else y.add_(residual)


def moments_of(y: Tensor) -> Tensor:  # [B, 2, C]
    variance, mean = torch.var_mean(y, dim=(2, 3, 4), correction=0)
    return torch.stack([mean, variance], dim=1)


def plain(args: tuple) -> tuple[Tensor, Tensor]:
    y = convolved(*args)
    return y, moments_of(y.float())


def plain_with_norm(args: tuple) -> Tensor:
    return F.silu(F.group_norm(convolved(*args), GROUPS, eps=EPS))


def with_norm(args: tuple, measured: bool) -> Tensor:
    y, moments = causal_conv3d_moments(*args) if measured else (causal_conv3d(*args), None)
    return group_norm_silu(*norm_of(y, moments))


def norm_of(y: Tensor, moments: Tensor | None) -> tuple:
    ones, zeros = torch.ones_like(y[0, :, 0, 0, 0]), torch.zeros_like(y[0, :, 0, 0, 0])
    return y, ones, zeros, None, GROUPS, EPS, 0, moments


def with_each(args: tuple, change: Callable[[Tensor], Tensor]) -> tuple:
    return tuple(None if t is None else change(t) for t in args)


@pytest.mark.parametrize("label", REAL)
@pytest.mark.parametrize("how", [PYTORCH, *BACKENDS])
@torch.no_grad()
def test_convolution_and_moments(measure, how, label):
    args = arguments(label)
    if how != PYTORCH:
        skip_unless_live("causal_conv3d_moments", how, *args)
    y, moments = measure(
        f"convolution and moments {label} {list(args[0].shape)}", how,
        (lambda: plain(args)) if how == PYTORCH else (lambda: causal_conv3d_moments(*args)),
        cost.of("causal_conv3d_moments", args), reference=None if how == PYTORCH else (lambda: plain(args)),
    )  # fmt: skip
    assert_as_accurate(y, convolved(*args), convolved(*with_each(args, Tensor.double)))
    torch.testing.assert_close(moments.double(), moments_of(y.double()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", REAL)
@pytest.mark.parametrize("how", [PYTORCH, "norm reads twice", "norm takes moments"])
@torch.no_grad()
def test_convolution_and_norm(measure, how, label):
    args = arguments(label)
    if how == "norm takes moments":
        skip_unless_live("causal_conv3d_moments", BACKENDS[0], *args)
    # The floor is that of a norm that is given its moments, and so reads what the convolution wrote once.
    of_norm = norm_of(*causal_conv3d_moments(*with_each(args, lambda t: t.to("meta"))))
    least = cost.of("causal_conv3d_moments", args) + cost.of("group_norm_silu", of_norm)
    y = measure(
        f"convolution and norm {label} {list(args[0].shape)}", how,
        (lambda: plain_with_norm(args)) if how == PYTORCH else (lambda: with_norm(args, how == "norm takes moments")),
        least, reference=None if how == PYTORCH else (lambda: plain_with_norm(args)),
    )  # fmt: skip
    with use_backend("reference"):
        eager, exact = with_norm(args, False), with_norm(with_each(args, Tensor.double), False)
    assert_as_accurate(y, eager, exact)
