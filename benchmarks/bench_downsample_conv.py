"""`downsample_conv` at the sizes of the published VAE, channels last."""

import cost
import pytest
import torch
from conftest import DEVICE, NARROW, assert_gradients_agree, skip_unless_live

from cogvx_kernels import downsample_conv, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.downsample_conv import reference
from cogvx_kernels.downsample_conv.cases import REAL
from cogvx_kernels.testing import assert_as_accurate

pytestmark = pytest.mark.products

BACKENDS = ["reference", *OPS["downsample_conv"].backends]


def arguments(case: str, dtype: torch.dtype) -> tuple:
    real = REAL[case]
    batch, num_in, num_out, frames, height, width = real.args
    if DEVICE == "cpu":
        height, width = min(height, 120), min(width, 180)
    args = real.func(batch, num_in, num_out, frames, height, width, **real.keywords, dtype=dtype, device=DEVICE)
    return args[0].contiguous(memory_format=torch.channels_last_3d), *args[1:]


def gradients(args: tuple, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in args]
    return torch.autograd.grad(downsample_conv(*leaves), leaves, grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(measure, backend, case, dtype):
    args = arguments(case, dtype)
    skip_unless_live("downsample_conv", backend, *args)
    plain = (args[0].contiguous(), *args[1:])
    y = measure(
        f"forward {case} {list(args[0].shape)} {dtype}", backend, lambda: downsample_conv(*args),
        cost.of("downsample_conv", args), reference=lambda: reference.forward(*plain),
    )  # fmt: skip
    few = (args[0][..., :16, :16], *args[1:])
    exact = reference.forward(*(x.double() for x in few))[..., :7, :7]
    assert_as_accurate(y[..., :7, :7], reference.forward(*args)[..., :7, :7], exact)


@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(measure, backend, case):
    args = arguments(case, NARROW)
    skip_unless_live("downsample_conv", backend, *args)
    with use_backend(backend):
        grad = torch.randn_like(downsample_conv(*args))
    group = f"forward and backward {case} {list(args[0].shape)}"
    found = measure(group, backend, lambda: gradients(args, grad), cost.with_gradients("downsample_conv", args))
    with use_backend("reference"):
        eager = gradients(args, grad)
    assert_gradients_agree(found, eager, grad)
