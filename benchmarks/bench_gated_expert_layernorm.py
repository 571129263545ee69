"""`gated_expert_layernorm` at the sizes of the released models."""

import cost
import pytest
import torch
from conftest import DEVICE, TOKENS_ON_CPU, skip_unless_live

from cogvx_kernels import gated_expert_layernorm, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.gated_expert_layernorm.cases import REAL
from cogvx_kernels.testing import assert_as_accurate

BACKENDS = ["reference", *OPS["gated_expert_layernorm"].backends]


def arguments(case: str, dtype: torch.dtype) -> tuple:
    real = REAL[case]
    batch, tokens, width, num_text = real.args
    if DEVICE == "cpu":  # all tokens of the smallest model, one sample of it; a part of the others
        batch, tokens = 1, tokens if case.startswith("2b") else TOKENS_ON_CPU
    return real.func(batch, tokens, width, min(num_text, tokens), dtype=dtype, device=DEVICE)


def gradients(args: tuple, grads: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() if torch.is_tensor(x) else x for x in args]
    return torch.autograd.grad(gated_expert_layernorm(*leaves), leaves[:7], grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(measure, backend, case, dtype):
    args = arguments(case, dtype)
    skip_unless_live("gated_expert_layernorm", backend, *args)
    group = f"forward {case} {list(args[0].shape)} {dtype}"
    results = measure(group, backend, lambda: gated_expert_layernorm(*args), cost.of("gated_expert_layernorm", args))
    few = (args[0][:, :300], args[1][:, :300], *args[2:])
    with use_backend("reference"):
        exact = gated_expert_layernorm(*(x.double() if torch.is_tensor(x) else x for x in few))
        for one, eager, truth in zip(results, gated_expert_layernorm(*few), exact, strict=True):
            assert_as_accurate(one[:, :300], eager, truth)


@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(measure, backend, case):
    args = arguments(case, torch.bfloat16)
    skip_unless_live("gated_expert_layernorm", backend, *args)
    grads = [torch.randn_like(args[0]) for _ in range(2)]
    group = f"forward and backward {case} {list(args[0].shape)}"
    found = measure(group, backend, lambda: gradients(args, grads), cost.with_gradients("gated_expert_layernorm", args))
    with use_backend("reference"):
        exact = gradients(tuple(x.double() if torch.is_tensor(x) else x for x in args), [g.double() for g in grads])
        eager = gradients(args, grads)
    for name, one, other, truth in zip(OPS["gated_expert_layernorm"].arguments, found, eager, exact, strict=False):
        assert_as_accurate(one, other, truth, 3, name)
