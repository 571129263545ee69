"""`gated_expert_layernorm` against a hand-worked row, its two halves, and what it must reduce to."""

import numpy as np
import pytest
import torch

from cogvx_kernels import expert_layernorm, gated_expert_layernorm, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.gated_expert_layernorm.cases import make

BACKENDS = ["reference", *OPS["gated_expert_layernorm"].backends]


@pytest.fixture(params=BACKENDS)
def backend(request, run_on):
    run_on("gated_expert_layernorm", request.param, *make(2, 9, 32, 4))
    with use_backend(request.param):
        yield request.param


def in_loops(x, y, gate, num_text):
    total = np.empty_like(x)
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            for d in range(x.shape[2]):
                total[b, n, d] = x[b, n, d] + gate[b, 0 if n < num_text else 1, d] * y[b, n, d]
    return total


def test_the_sum_is_the_formula_and_the_norm_is_its_norm():
    x, y, gate, *norm = make(2, 5, 7, 2, dtype=torch.float64)
    with use_backend("reference"):
        x_new, normed = gated_expert_layernorm(x, y, gate, *norm)
        expected = in_loops(x.numpy(), y.numpy(), gate.numpy(), num_text=2)
        np.testing.assert_allclose(x_new.numpy(), expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(normed, expert_layernorm(x_new, *norm))


def test_a_hand_worked_row(backend):
    def row(*values: float) -> torch.Tensor:  # eight times over, which no norm notices
        return torch.tensor(values, dtype=torch.float32).repeat(8)

    x, y = torch.stack([row(1, 2), row(0, 0)])[None], torch.stack([row(2, 1), row(4, 8)])[None]
    gate = torch.stack([row(0, 1), row(0.5, -0.5)])[None]
    shift, scale = torch.stack([row(10, 0), row(0, 20)])[None], torch.stack([row(0, 1), row(2, 0)])[None]
    x_new, normed = gated_expert_layernorm(x, y, gate, row(2, 1), row(0, 0), shift, scale, 1, 1e-12)
    assert torch.equal(x_new, torch.stack([row(1, 3), row(2, -4)])[None])
    torch.testing.assert_close(normed, torch.stack([row(8, 2), row(6, 19)])[None])  # -1, 1 and 1, -1 behind the norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_reads_the_sum_as_it_is_stored(backend, dtype):
    # Half of a unit in the last place is lost from each sum: a norm of the exact sums would not be 0.
    x = torch.full((1, 4, 64), 1.0, dtype=dtype)
    y = torch.full((1, 4, 64), torch.finfo(dtype).eps / 4, dtype=dtype)
    y[..., ::2] = 0
    gate, weight, bias = torch.ones(1, 2, 64, dtype=dtype), torch.ones(64, dtype=dtype), torch.zeros(64, dtype=dtype)
    x_new, normed = gated_expert_layernorm(x, y, gate, weight, bias, 0 * gate, 0 * gate, 1, 1e-30)
    assert torch.equal(x_new, x)
    assert torch.equal(normed, torch.zeros_like(x))


def test_a_closed_gate_leaves_the_stream_and_its_norm(backend):
    x, y, gate, *norm = make(2, 9, 32, 4)
    x_new, normed = gated_expert_layernorm(x, y, 0 * gate, *norm)
    assert torch.equal(x_new, x)
    torch.testing.assert_close(normed, expert_layernorm(x, *norm))


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone_has_its_gradients(backend, used):
    args = make(1, 5, 16, 2, dtype=torch.float32)
    grads = []
    for function in (gated_expert_layernorm, OPS["gated_expert_layernorm"].reference.forward):
        leaves = [a.detach().requires_grad_() if torch.is_tensor(a) else a for a in args]
        result = function(*leaves)[used]
        grads.append(torch.autograd.grad(result.square().sum(), leaves[:7], allow_unused=True, materialize_grads=True))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_gradients_do_not_depend_on_the_number_of_threads():
    args = [a.requires_grad_() if torch.is_tensor(a) else a for a in make(2, 333, 40, 70)]
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            x_new, normed = gated_expert_layernorm(*args)
            found.append(torch.autograd.grad((x_new * normed).sum(), args[:7]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_results_are_those_of_their_parts(dtype, run_on):
    # Large ones are written past the caches.
    x, y, *rest = make(1, 2400, 1920, 0, dtype=dtype)
    run_on("gated_expert_layernorm", "native", x, y, *rest)

    def run(rows):
        leaves = [a.detach().requires_grad_() for a in (x[:, rows], y[:, rows])]
        results = gated_expert_layernorm(*leaves, *rest)
        return *results, *torch.autograd.grad(results, leaves, [p.detach() for p in results])

    with use_backend("native"):
        whole = run(slice(None))
        parts = zip(run(slice(800)), run(slice(800, 1600)), run(slice(1600, None)), strict=True)
        assert whole[0].nbytes > 2**23
        for one, few in zip(whole, parts, strict=True):
            assert torch.equal(one, torch.cat(few, dim=1))
