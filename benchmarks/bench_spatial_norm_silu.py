"""`spatial_norm_silu` at the sizes of the published decoder, channels last."""

import cost
import pytest
import torch
from conftest import DEVICE, skip_unless_live

from cogvx_kernels import spatial_norm_silu, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.spatial_norm_silu.cases import PARTS, REAL
from cogvx_kernels.testing import assert_as_accurate

BACKENDS = ["reference", *OPS["spatial_norm_silu"].backends]


def arguments(case: str, dtype: torch.dtype) -> tuple:
    args = (REAL if DEVICE == "cuda" else PARTS)[case](dtype=dtype, device=DEVICE)
    return args[0].contiguous(memory_format=torch.channels_last_3d), *args[1:]


def in_float64(args: tuple) -> tuple:
    return tuple(x.double() if torch.is_tensor(x) else x for x in args)


def gradients(args: tuple, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in args[:8]]
    return torch.autograd.grad(spatial_norm_silu(*leaves, *args[8:]), leaves, grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(measure, backend, case, dtype):
    args = arguments(case, dtype)
    skip_unless_live("spatial_norm_silu", backend, *args)
    group = f"forward {case} {list(args[0].shape)} {dtype}"
    y = measure(group, backend, lambda: spatial_norm_silu(*args), cost.of("spatial_norm_silu", args))
    with use_backend("reference"):
        assert_as_accurate(y, spatial_norm_silu(*args), spatial_norm_silu(*in_float64(args)))


@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(measure, backend, case):
    args = arguments(case, torch.bfloat16)
    skip_unless_live("spatial_norm_silu", backend, *args)
    grad = torch.randn_like(spatial_norm_silu(*args))
    group = f"forward and backward {case} {list(args[0].shape)}"
    found = measure(group, backend, lambda: gradients(args, grad), cost.with_gradients("spatial_norm_silu", args))
    with use_backend("reference"):
        exact, eager = gradients(in_float64(args), grad.double()), gradients(args, grad)
    for i, one in enumerate(found):
        assert_as_accurate(one, eager[i], exact[i], 3, OPS["spatial_norm_silu"].arguments[i])
