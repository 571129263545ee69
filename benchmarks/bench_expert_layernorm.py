"""`expert_layernorm` at the sizes of the released models."""

import cost
import pytest
import torch
from conftest import DEVICE, TOKENS_ON_CPU, skip_unless_live

from cogvx_kernels import expert_layernorm, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.expert_layernorm.cases import REAL
from cogvx_kernels.testing import assert_as_accurate

BACKENDS = ["reference", *OPS["expert_layernorm"].backends]


def arguments(case: str, dtype: torch.dtype) -> tuple:
    real = REAL[case]
    batch, tokens, width, num_text = real.args
    tokens = tokens if DEVICE == "cuda" else TOKENS_ON_CPU
    return real.func(batch, tokens, width, min(num_text, tokens), dtype=dtype, device=DEVICE)


def gradients(args: tuple, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() if torch.is_tensor(x) else x for x in args]
    return torch.autograd.grad(expert_layernorm(*leaves), leaves[:5], grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(measure, backend, case, dtype):
    args = arguments(case, dtype)
    skip_unless_live("expert_layernorm", backend, *args)
    group = f"forward {case} {list(args[0].shape)} {dtype}"
    y = measure(group, backend, lambda: expert_layernorm(*args), cost.of("expert_layernorm", args))
    few = (args[0][:, :300], *args[1:])
    with use_backend("reference"):
        exact = expert_layernorm(*(x.double() if torch.is_tensor(x) else x for x in few))
        assert_as_accurate(y[:, :300], expert_layernorm(*few), exact)


@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(measure, backend, case):
    args = arguments(case, torch.bfloat16)
    skip_unless_live("expert_layernorm", backend, *args)
    grad = torch.randn_like(args[0])
    group, least = f"forward and backward {case} {list(args[0].shape)}", cost.with_gradients("expert_layernorm", args)
    found = measure(group, backend, lambda: gradients(args, grad), least)
    with use_backend("reference"):
        exact = gradients(tuple(x.double() if torch.is_tensor(x) else x for x in args), grad.double())
        eager = gradients(args, grad)
    for name, one, other, truth in zip(("x", "weight", "bias", "shift", "scale"), found, eager, exact, strict=True):
        assert_as_accurate(one, other, truth, 3, name)
