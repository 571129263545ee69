"""`causal_conv3d_moments` and the norm that takes them, beside the convolution and a norm that reads twice."""

import cost
import pytest
import torch
from conftest import DEVICE, skip_unless_live

from cogvx_kernels import causal_conv3d, causal_conv3d_moments, group_norm_silu, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.causal_conv3d_moments.cases import REAL
from cogvx_kernels.testing import assert_as_accurate


def arguments(label: str) -> tuple:
    real = REAL[label]
    size = real.args if DEVICE == "cuda" else (*real.args[:3], 1, 24, 40)
    x, *others = real.func(*size, **real.keywords, dtype=torch.bfloat16, device=DEVICE)
    return x.contiguous(memory_format=torch.channels_last_3d), *others


def with_norm(args: tuple, measured: bool) -> torch.Tensor:
    y, moments = causal_conv3d_moments(*args) if measured else (causal_conv3d(*args), None)
    ones, zeros = torch.ones_like(y[0, :, 0, 0, 0]), torch.zeros_like(y[0, :, 0, 0, 0])
    return group_norm_silu(y, ones, zeros, None, 32, 1e-6, 2, moments)


@pytest.mark.parametrize("label", REAL)
@pytest.mark.parametrize("backend", ["reference", *OPS["causal_conv3d_moments"].backends])
@pytest.mark.parametrize("measured", [False, True], ids=["norm reads twice", "norm takes moments"])
@torch.no_grad()
def test_convolution_and_norm(measure, measured, backend, label):
    args = arguments(label)
    skip_unless_live("causal_conv3d_moments", backend, *args)
    group = f"convolution and norm, {'with' if measured else 'without'} moments, {label} {list(args[0].shape)}"
    y = measure(group, backend, lambda: with_norm(args, measured), cost.of("causal_conv3d_moments", args))
    with use_backend("reference"):
        eager, exact = (with_norm(x, False) for x in (args, tuple(None if t is None else t.double() for t in args)))
    assert_as_accurate(y, eager, exact)
