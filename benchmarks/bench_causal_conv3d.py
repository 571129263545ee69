"""`causal_conv3d` at the sizes of the published VAE, channels last."""

from collections.abc import Callable

import cost
import pytest
import torch
from conftest import DEVICE, NARROW, skip_unless_live

from cogvx_kernels import causal_conv3d, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.causal_conv3d import reference
from cogvx_kernels.causal_conv3d.cases import REAL
from cogvx_kernels.testing import assert_as_accurate

pytestmark = pytest.mark.products

BACKENDS = ["reference", *OPS["causal_conv3d"].backends]


def arguments(case: str, dtype: torch.dtype) -> tuple:
    real = REAL[case]
    batch, num_in, num_out, frames, height, width = real.args
    if DEVICE == "cpu":
        height, width = min(height, 60), min(width, 90)
    x, weight, bias, residual = real.func(
        batch, num_in, num_out, frames, height, width, **real.keywords, dtype=dtype, device=DEVICE
    )
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last_3d)
    return x.contiguous(memory_format=torch.channels_last_3d), weight, bias, residual


def changed(args: tuple, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple:
    return tuple(None if x is None else change(x) for x in args)


def gradients(args: tuple, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = changed(args, lambda x: x.detach().requires_grad_())
    return torch.autograd.grad(causal_conv3d(*leaves), [x for x in leaves if x is not None], grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(measure, backend, case, dtype):
    args = arguments(case, dtype)
    skip_unless_live("causal_conv3d", backend, *args)
    plain = changed(args, torch.Tensor.contiguous)
    y = measure(
        f"forward {case} {list(args[0].shape)} {dtype}", backend, lambda: causal_conv3d(*args),
        cost.of("causal_conv3d", args), reference=lambda: reference.forward(*plain),
    )  # fmt: skip
    x, weight, bias, residual = args
    few = (x[..., :9, :9], weight, bias, None if residual is None else residual[..., :9, :9])
    exact = reference.forward(*changed(few, torch.Tensor.double))[..., :8, :8]
    assert_as_accurate(y[..., :8, :8], reference.forward(*args)[..., :8, :8], exact)


@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(measure, backend, case):
    args = arguments(case, NARROW)
    skip_unless_live("causal_conv3d", backend, *args)
    with use_backend(backend):
        grad = torch.randn_like(causal_conv3d(*args))
    group = f"forward and backward {case} {list(args[0].shape)}"
    found = measure(group, backend, lambda: gradients(args, grad), cost.with_gradients("causal_conv3d", args))
    with use_backend("reference"):
        eager = gradients(args, grad)
    for one, other in zip(found, eager, strict=True):
        assert (one.float() - other.float()).abs().max() <= 8 * torch.finfo(one.dtype).eps * other.abs().max()
