"""`linear` against hand-worked products, in every layout, and that threads do not change it."""

import pytest
import torch

from cogvx_kernels import linear, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.linear.cases import make

BACKENDS = ["reference", *OPS["linear"].backends]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hand_worked_product(backend, run_on):
    x = torch.tensor([[[1.0, 2.0]]]).expand(2, 50, 2)
    weight, bias = torch.tensor([[3.0, 4.0], [0.0, -1.0]]), torch.tensor([0.5, 0.0])
    run_on("linear", backend, x, weight, bias, False)
    with use_backend(backend):
        assert torch.equal(linear(x, weight, bias), torch.tensor([11.5, -2.0]).expand(2, 50, 2))
        assert torch.equal(linear(x, weight, None), torch.tensor([11.0, -2.0]).expand(2, 50, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_comes_last(backend, run_on):
    x, weight, bias, _ = make(2, 50, 12, 9)
    run_on("linear", backend, x, weight, bias, True)
    with use_backend(backend):
        y = linear(x, weight, bias)
        expected = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
        torch.testing.assert_close(linear(x, weight, bias, gelu=True), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_weights_are_multiplied_as_they_are(backend, run_on):
    x, weight, bias, _ = make(2, 50, 12, 9)
    strided = weight.t().contiguous().t()
    run_on("linear", backend, x, strided, bias, False)
    with use_backend(backend):
        torch.testing.assert_close(linear(x, strided, bias), torch.einsum("bnd,kd->bnk", x, weight) + bias)


def test_double_precision_keeps_pytorchs_product():
    args = make(1, 2, 3, 4, dtype=torch.float64)
    assert "works in float32" in OPS["linear"].why_not("native", *args)
    assert torch.equal(linear(*args), torch.nn.functional.linear(*args[:3]))


@pytest.mark.parametrize("sizes", [(301, 70, 90), (100, 2111, 2222)])  # the second weight is packed in three turns
def test_results_do_not_depend_on_the_number_of_threads(sizes):
    x, weight, bias, _ = make(1, *sizes)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(linear(x, weight, bias, gelu=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    with use_backend("reference"):
        torch.testing.assert_close(found[0], linear(x, weight, bias, gelu=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_of_any_number(backend, run_on):
    x = torch.tensor([0.0, -0.0, 1e-30, -5.0, 5.0, -88.0, 3e38, -3e38, torch.inf, torch.nan])[None, :, None]
    x = x.repeat(1, 8, 1)
    one = torch.ones(1, 1)
    run_on("linear", backend, x, one, None, True)
    with use_backend(backend):
        y = linear(x, one, None, gelu=True)
    expected = torch.nn.functional.gelu(x.double(), approximate="tanh").float()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_through_gelu_at_any_number(backend, run_on):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([1e-30, -88.0, 3e18, -3e18, torch.nan])])
    x = x[None, :, None].requires_grad_()
    one, grad = torch.ones(1, 1), torch.linspace(-2, 2, x.numel())[None, :, None]
    run_on("linear", backend, x, one, None, True)
    with use_backend(backend):
        (found,) = torch.autograd.grad(linear(x, one, None, gelu=True), x, grad)
    exact = torch.ops.aten.gelu_backward(grad.double(), x.detach().double(), approximate="tanh")
    torch.testing.assert_close(found, exact.float(), rtol=2e-6, atol=2e-6, equal_nan=True)
