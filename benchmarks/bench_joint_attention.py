"""`joint_attention` at the lengths of the released models; the reference is torch's scaled_dot_product_attention."""

import cost
import pytest
import torch
from conftest import DEVICE, skip_unless_live

from cogvx_kernels import joint_attention, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.joint_attention.cases import REAL
from cogvx_kernels.testing import assert_as_accurate

pytestmark = pytest.mark.products

BACKENDS = ["reference", *OPS["joint_attention"].backends]
LENGTHS = {4096: "2b, 4096 tokens", 17776: "2b, 49 x 480 x 720"}
HEADS_ON_CPU = {4096: 4, 17776: 1}  # a CPU takes minutes for all of them
CASES = [(4096, torch.bfloat16), (17776, torch.bfloat16), (4096, torch.float32)]


def arguments(tokens: int, dtype: torch.dtype) -> tuple:
    real = REAL[LENGTHS[tokens]]
    batch, heads, _, width = real.args
    if DEVICE == "cpu":
        batch, heads = 1, HEADS_ON_CPU[tokens]
    return real.func(batch, heads, tokens, width, dtype=dtype, device=DEVICE)


def gradients(args: tuple, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in args[:3]]
    return torch.autograd.grad(joint_attention(*leaves), leaves, grad)


@pytest.mark.parametrize(("tokens", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(measure, backend, tokens, dtype):
    args = arguments(tokens, dtype)
    skip_unless_live("joint_attention", backend, *args)
    group = f"forward {list(args[0].shape)} {dtype}"
    y = measure(group, backend, lambda: joint_attention(*args), cost.of("joint_attention", args))
    width, few = args[0].shape[-1], [x[:1, :1] for x in args[:3]]
    with use_backend("reference"):
        eager, exact = joint_attention(*few), joint_attention(*(x.double() for x in few))
    assert_as_accurate(y[:1, :, :width], eager, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(measure, backend, dtype):
    args = arguments(4096, dtype)
    skip_unless_live("joint_attention", backend, *args)
    grad = torch.randn_like(joint_attention(*args))
    group = f"forward and backward {list(args[0].shape)} {dtype}"
    found = measure(group, backend, lambda: gradients(args, grad), cost.with_gradients("joint_attention", args))
    width, few = args[0].shape[-1], [x[:1, :1] for x in args[:3]]
    of_few = grad[:1, :, :width]
    with use_backend("reference"):
        eager, exact = gradients(few, of_few), gradients([x.double() for x in few], of_few.double())
    for name, one, other, truth in zip("qkv", found, eager, exact, strict=True):
        assert_as_accurate(one[:1, :1], other, truth, 3, name)
