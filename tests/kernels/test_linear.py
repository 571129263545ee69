"""`linear` against a hand-worked product, and that it is PyTorch's own where no backend is faster."""

import pytest
import torch

from cogvx_kernels import linear, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.linear.cases import make

BACKENDS = ["reference", *OPS["linear"].backends]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hand_worked_product(backend, run_on):
    x, weight, bias = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[3.0, 4.0], [0.0, -1.0]]), torch.tensor([0.5, 0.0])
    run_on("linear", backend, x, weight, bias, False)
    with use_backend(backend):
        assert torch.equal(linear(x, weight, bias), torch.tensor([[[11.5, -2.0]]]))
        assert torch.equal(linear(x, weight, None), torch.tensor([[[11.0, -2.0]]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_comes_last(backend, run_on):
    x, weight, bias, _ = make(2, 5, 12, 9)
    run_on("linear", backend, x, weight, bias, True)
    with use_backend(backend):
        y = linear(x, weight, bias)
        expected = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
        torch.testing.assert_close(linear(x, weight, bias, gelu=True), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_weights_are_multiplied_as_they_are(backend, run_on):
    x, weight, bias, _ = make(2, 5, 12, 9)
    strided = weight.t().contiguous().t()
    run_on("linear", backend, x, strided, bias, False)
    with use_backend(backend):
        torch.testing.assert_close(linear(x, strided, bias), torch.einsum("bnd,kd->bnk", x, weight) + bias)


def test_double_precision_keeps_pytorchs_product():
    args = make(1, 2, 3, 4, dtype=torch.float64)
    assert "up to float32" in OPS["linear"].why_not("onednn", *args)
    assert torch.equal(linear(*args), torch.nn.functional.linear(*args[:3]))


def test_a_pytorch_without_the_product_is_no_reason_to_fail(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    x, weight, bias, _ = make(2, 5, 12, 9)
    assert "without oneDNN" in OPS["linear"].why_not("onednn", x, weight, bias, False)
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
