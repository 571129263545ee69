"""`expert_layernorm` against a loop and against what it must reduce to."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cogvx_kernels import expert_layernorm, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.expert_layernorm.cases import make

BACKENDS = ["reference", *OPS["expert_layernorm"].backends]


@pytest.fixture(params=BACKENDS)
def backend(request, run_on):
    run_on("expert_layernorm", request.param, *make(2, 9, 32, 4))
    with use_backend(request.param):
        yield request.param


def in_loops(x, weight, bias, shift, scale, num_text, eps):
    y = np.empty_like(x)
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            m = 0 if n < num_text else 1
            mean = sum(x[b, n]) / x.shape[2]
            variance = sum((value - mean) ** 2 for value in x[b, n]) / x.shape[2]
            for d in range(x.shape[2]):
                normal = (x[b, n, d] - mean) / (variance + eps) ** 0.5 * weight[d] + bias[d]
                y[b, n, d] = normal * (1 + scale[b, m, d]) + shift[b, m, d]
    return y


def test_it_is_the_formula():
    args = make(2, 5, 7, 2, dtype=torch.float64)
    expected = in_loops(*(x.numpy() if isinstance(x, torch.Tensor) else x for x in args))
    with use_backend("reference"):
        np.testing.assert_allclose(expert_layernorm(*args).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_a_hand_worked_row():
    x = torch.tensor([[[1.0, 3.0], [2.0, -2.0]]])  # both rows normalize to -1, 1 and 1, -1
    shift, scale = torch.tensor([[[10.0, 0.0], [0.0, 20.0]]]), torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    y = expert_layernorm(x, torch.tensor([2.0, 1.0]), torch.zeros(2), shift, scale, 1, 1e-12)
    torch.testing.assert_close(y, torch.tensor([[[8.0, 2.0], [6.0, 19.0]]]))


def test_equal_modulations_make_an_ordinary_layernorm(backend):
    x, weight, bias, shift, scale, num_text, eps = make(2, 9, 32, 4)
    y = expert_layernorm(x, weight, bias, torch.zeros_like(shift), torch.zeros_like(scale), num_text, eps)
    torch.testing.assert_close(y, F.layer_norm(x, (32,), weight, bias, eps))


def test_each_expert_touches_its_own_rows_alone(backend):
    x, weight, bias, shift, scale, num_text, eps = make(2, 9, 32, 4)
    y = expert_layernorm(x, weight, bias, shift, scale, num_text, eps)
    for m, rows in ((0, slice(num_text, None)), (1, slice(num_text))):
        other = shift.clone()
        other[:, m] += 1
        z = expert_layernorm(x, weight, bias, other, scale, num_text, eps)
        assert torch.equal(z[:, rows], y[:, rows])
        assert not torch.equal(z, y)


def test_a_large_mean_costs_no_accuracy(backend):
    x, weight, bias, shift, scale, num_text, eps = make(1, 9, 64, 4, dtype=torch.float64)
    args = [t.float() for t in (x + 1000, weight, bias, shift, scale)]
    exact = OPS["expert_layernorm"].reference.forward(*(t.double() for t in args), num_text, eps)
    torch.testing.assert_close(expert_layernorm(*args, num_text, eps).double(), exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_results_are_those_of_their_parts(dtype, run_on):
    # Large ones are written past the caches.
    x, *rest = make(1, 2400, 1920, 0, dtype=dtype)
    run_on("expert_layernorm", "native", x, *rest)

    def run(rows):
        leaf = x[:, rows].detach().requires_grad_()
        y = expert_layernorm(leaf, *rest)
        return y, *torch.autograd.grad(y, leaf, y.detach())

    with use_backend("native"):
        whole = run(slice(None))
        parts = zip(run(slice(800)), run(slice(800, 1600)), run(slice(1600, None)), strict=True)
        assert whole[0].nbytes > 2**23
        for one, few in zip(whole, parts, strict=True):
            assert torch.equal(one, torch.cat(few, dim=1))
