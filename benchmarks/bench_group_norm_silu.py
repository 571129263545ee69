"""`group_norm_silu` at the sizes of the published encoder, channels last."""

import cost
import pytest
import torch
from conftest import DEVICE, skip_unless_live

from cogvx_kernels import group_norm_silu, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.group_norm_silu.cases import PARTS, REAL
from cogvx_kernels.testing import assert_as_accurate

BACKENDS = ["reference", *OPS["group_norm_silu"].backends]


def arguments(case: str, dtype: torch.dtype) -> tuple:
    args = (REAL if DEVICE == "cuda" else PARTS)[case](dtype=dtype, device=DEVICE)
    return args[0].contiguous(memory_format=torch.channels_last_3d), *args[1:]


def in_float64(args: tuple) -> tuple:
    return tuple(x.double() if torch.is_tensor(x) else x for x in args)


def gradients(args: tuple, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in args[:3]]
    return torch.autograd.grad(group_norm_silu(*leaves, *args[3:]), leaves, grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(measure, backend, case, dtype):
    args = arguments(case, dtype)
    skip_unless_live("group_norm_silu", backend, *args)
    group = f"forward {case} {list(args[0].shape)} {dtype}"
    y = measure(group, backend, lambda: group_norm_silu(*args), cost.of("group_norm_silu", args))
    with use_backend("reference"):
        assert_as_accurate(y, group_norm_silu(*args), group_norm_silu(*in_float64(args)))


@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(measure, backend, case):
    args = arguments(case, torch.bfloat16)
    skip_unless_live("group_norm_silu", backend, *args)
    grad = torch.randn_like(group_norm_silu(*args))
    group = f"forward and backward {case} {list(args[0].shape)}"
    found = measure(group, backend, lambda: gradients(args, grad), cost.with_gradients("group_norm_silu", args))
    with use_backend("reference"):
        exact, eager = gradients(in_float64(args), grad.double()), gradients(args, grad)
    for name, *values in zip(("x", "weight", "bias"), found, eager, exact, strict=True):
        assert_as_accurate(*values, 3, name)
