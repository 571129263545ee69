"""`causal_conv3d` against a loop; causality, and chunks with a halo."""

import numpy as np
import pytest
import torch

from cogvx_kernels import causal_conv3d, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.causal_conv3d import _merged, reference
from cogvx_kernels.causal_conv3d.cases import SMALL, make


def in_loops(x, weight, bias):
    b, _, frames, h, w = x.shape
    c_out, _, k_t, k_h, k_w = weight.shape
    padded = np.pad(x, ((0, 0), (0, 0), (0, 0), (k_h // 2, k_h // 2), (k_w // 2, k_w // 2)))
    y = np.zeros((b, c_out, frames - k_t + 1, h, w))
    for i, o, t, row, column in np.ndindex(*y.shape):
        window = padded[i, :, t : t + k_t, row : row + k_h, column : column + k_w]
        y[i, o, t, row, column] = (window * weight[o]).sum() + (0 if bias is None else bias[o])
    return y


def test_it_is_the_formula():
    for case in SMALL:
        args = case(dtype=torch.float64)
        expected = in_loops(*(None if x is None else x.numpy() for x in args))
        np.testing.assert_allclose(causal_conv3d(*args).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("backend", ["reference", *OPS["causal_conv3d"].backends])
def test_two_chunks_with_a_halo_equal_one_pass(backend, still, dtype, run_on):
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps}[dtype]
    size = (16, 32) if backend == "merged" else (6, 5)  # large enough for a repeated frame to be worth a thought
    x, weight, bias = make(1, 4, 5, 7, *size, still=still, dtype=dtype)  # two frames of halo, then seven
    if backend != "triton" or dtype != torch.float64:
        run_on("causal_conv3d", backend, x, weight, bias)
        with use_backend(backend):
            whole = causal_conv3d(x, weight, bias)
            chunks = torch.cat([causal_conv3d(part, weight, bias) for part in (x[:, :, :5], x[:, :, 3:])], dim=2)
        assert (chunks - whole).abs().max() <= (0 if backend == "triton" else bound) * whole.abs().max()


def test_a_halo_that_repeats_the_first_frame_costs_fewer_products(monkeypatch):
    products = []

    def conv(x, weight, bias):
        products.append(weight.numel() // (5 * 4 * 9) * (x.shape[2] - 2 if x.dim() == 5 else 1))  # taps in time, frames
        return convolve(x, weight, bias)

    convolve = _merged._conv
    monkeypatch.setattr(_merged, "_conv", conv)
    for still, expected in ((False, 4 * 3), (True, 1 + 2 + 2 * 3)):
        args = make(1, 4, 5, 4, 16, 32, still=still, dtype=torch.float64)
        products.clear()
        torch.testing.assert_close(_merged.forward(*args), reference.forward(*args))
        assert sum(products) == expected


def test_a_frame_changes_no_earlier_one():
    x, weight, bias = make(1, 4, 5, 4, 6, 5)
    y = causal_conv3d(x, weight, bias)
    x[:, :, 4] += 1  # the buffer's frame 4 is the chunk's frame 2
    z = causal_conv3d(x, weight, bias)
    changed = (y != z).transpose(0, 2).flatten(1).any(dim=1)
    assert changed.tolist() == [False, False, True, True]


def test_the_halo_gets_its_gradient():
    x, weight, bias = make(1, 2, 3, 2, 3, 3, dtype=torch.float64)
    torch.autograd.gradcheck(torch.ops.cogvx.causal_conv3d, [t.requires_grad_() for t in (x, weight, bias)])
    grads = reference.backward(torch.ones(1, 3, 2, 3, 3).double(), x, weight, bias)
    assert grads[0][:, :, :2].abs().min() > 0
