"""`upsample_conv` at the sizes of the published VAE, channels last."""

import cost
import pytest
import torch
from conftest import DEVICE, NARROW, assert_gradients_agree, skip_unless_live

from cogvx_kernels import upsample_conv, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.testing import assert_as_accurate
from cogvx_kernels.upsample_conv import reference
from cogvx_kernels.upsample_conv.cases import REAL

pytestmark = pytest.mark.products

BACKENDS = ["reference", *OPS["upsample_conv"].backends]


def arguments(case: str, dtype: torch.dtype) -> tuple:
    real = REAL[case]
    batch, num_in, num_out, frames, height, width = real.args
    if DEVICE == "cpu":
        height, width = min(height, 30), min(width, 45)
    args = real.func(batch, num_in, num_out, frames, height, width, **real.keywords, dtype=dtype, device=DEVICE)
    return args[0].contiguous(memory_format=torch.channels_last_3d), *args[1:]


def gradients(args: tuple, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in args[:3]]
    return torch.autograd.grad(upsample_conv(*leaves, args[3]), leaves, grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(measure, backend, case, dtype):
    args = arguments(case, dtype)
    skip_unless_live("upsample_conv", backend, *args)
    plain = (args[0].contiguous(), *args[1:])
    y = measure(
        f"forward {case} {list(args[0].shape)} {dtype}", backend, lambda: upsample_conv(*args),
        cost.of("upsample_conv", args), reference=lambda: reference.forward(*plain),
    )  # fmt: skip
    few = (args[0][..., :9, :9], *args[1:])
    exact = reference.forward(*(x.double() if torch.is_tensor(x) else x for x in few))[..., :16, :16]
    assert_as_accurate(y[..., :16, :16], reference.forward(*args)[..., :16, :16], exact)


@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(measure, backend, case):
    args = arguments(case, NARROW)
    skip_unless_live("upsample_conv", backend, *args)
    with use_backend(backend):
        grad = torch.randn_like(upsample_conv(*args))
    group = f"forward and backward {case} {list(args[0].shape)}"
    found = measure(group, backend, lambda: gradients(args, grad), cost.with_gradients("upsample_conv", args))
    with use_backend("reference"):
        eager = gradients(args, grad)
    assert_gradients_agree(found, eager, grad)
