"""`qk_norm_rope` at the sizes of the released models."""

import cost
import pytest
import torch
from conftest import DEVICE, TOKENS_ON_CPU, skip_unless_live

from cogvx_kernels import qk_norm_rope, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.qk_norm_rope.cases import REAL
from cogvx_kernels.testing import assert_as_accurate

BACKENDS = ["reference", *OPS["qk_norm_rope"].backends]


def arguments(case: str, dtype: torch.dtype) -> tuple:
    real = REAL[case]
    batch, tokens, num_text, *heads = real.args
    tokens = tokens if DEVICE == "cuda" else TOKENS_ON_CPU
    return real.func(batch, tokens, min(num_text, tokens), *heads, **real.keywords, dtype=dtype, device=DEVICE)


def gradients(args: tuple, grads: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in args[:5]]
    return torch.autograd.grad(qk_norm_rope(*leaves, *args[5:]), leaves, grads)


def in_float64(args: tuple) -> tuple:
    return tuple(x.double() if torch.is_tensor(x) else x for x in args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(measure, backend, case, dtype):
    args = arguments(case, dtype)
    skip_unless_live("qk_norm_rope", backend, *args)
    group = f"forward {case} {list(args[0].shape)} {dtype}"
    found = measure(group, backend, lambda: qk_norm_rope(*args), cost.of("qk_norm_rope", args))
    with use_backend("reference"):
        every = zip("qkv", found, qk_norm_rope(*args), qk_norm_rope(*in_float64(args)), strict=True)
    for name, one, eager, exact in every:
        assert_as_accurate(one, eager, exact, what=name)


@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(measure, backend, case):
    args = arguments(case, torch.bfloat16)
    skip_unless_live("qk_norm_rope", backend, *args)
    grads = [torch.randn_like(part) for part in qk_norm_rope(*args)]
    group = f"forward and backward {case} {list(args[0].shape)}"
    found = measure(group, backend, lambda: gradients(args, grads), cost.with_gradients("qk_norm_rope", args))
    with use_backend("reference"):
        exact, eager = gradients(in_float64(args), [g.double() for g in grads]), gradients(args, grads)
    for i, one in enumerate(found):
        assert_as_accurate(one, eager[i], exact[i], 3, OPS["qk_norm_rope"].arguments[i])
