"""`causal_conv3d` against a loop; causality, and chunks with a halo."""

import numpy as np
import pytest
import torch

from cogvx_kernels import causal_conv3d, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.causal_conv3d import _minimal, reference
from cogvx_kernels.causal_conv3d.cases import SMALL, make
from cogvx_kernels.testing import assert_as_accurate

ON_CPUS = ("reference", "minimal")  # whose sums may depend on the shape


def in_loops(x, weight, bias, residual):
    b, _, frames, h, w = x.shape
    c_out, _, k_t, k_h, k_w = weight.shape
    padded = np.pad(x, ((0, 0), (0, 0), (0, 0), (k_h // 2, k_h // 2), (k_w // 2, k_w // 2)))
    y = np.zeros((b, c_out, frames - k_t + 1, h, w)) if residual is None else residual.copy()
    for i, o, t, row, column in np.ndindex(*y.shape):
        window = padded[i, :, t : t + k_t, row : row + k_h, column : column + k_w]
        y[i, o, t, row, column] += (window * weight[o]).sum() + (0 if bias is None else bias[o])
    return y


def test_it_is_the_formula():
    for case in SMALL:
        args = case(dtype=torch.float64)
        expected = in_loops(*(None if x is None else x.numpy() for x in args))
        np.testing.assert_allclose(causal_conv3d(*args).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def small_counts(monkeypatch):
    """Let the CPU backend save products on small tensors too; its convolutions: taps in time times frames."""
    counts = []
    conv = _minimal._conv

    def counted(x, weight, bias):
        counts.append((x.shape[2] - 2) * 3 if x.dim() == 5 else len(x))
        return conv(x, weight, bias)

    monkeypatch.setattr(_minimal, "_conv", counted)
    monkeypatch.setattr(_minimal, "_LEAST_PIXELS", 0)
    monkeypatch.setattr(_minimal, "_LEAST_CHANNELS", 0)
    return counts


def channels_last(x, *others):
    return x.contiguous(memory_format=torch.channels_last_3d), *others


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("backend", ["reference", *OPS["causal_conv3d"].backends])
def test_two_chunks_with_a_halo_equal_one_pass(backend, still, dtype, small_counts, run_on):
    if dtype not in (*OPS["causal_conv3d"].dtypes(backend), *([torch.float64] if backend in ON_CPUS else [])):
        return
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps}[dtype]
    x, weight, bias, _ = channels_last(
        *make(1, 4, 5, 7, 6, 5, still=still, dtype=dtype)
    )  # two frames of halo, then seven
    run_on("causal_conv3d", backend, x, weight, bias, None)
    with use_backend(backend):
        whole = causal_conv3d(x, weight, bias)
        for split in (1, 2, 3, 4):
            parts = (x[:, :, : split + 2], x[:, :, split:])
            chunks = torch.cat([causal_conv3d(part, weight, bias) for part in parts], dim=2)
            assert (chunks - whole).abs().max() <= (bound if backend in ON_CPUS else 0) * whole.abs().max()


@pytest.mark.parametrize("backend", [name for name in OPS["causal_conv3d"].backends if name not in ON_CPUS])
def test_where_a_pixel_stands_in_its_tile_changes_no_bit(backend, run_on):
    x, weight, bias, _ = make(1, 40, 6, 1, 4, 5, dtype=torch.bfloat16)
    run_on("causal_conv3d", backend, x, weight, bias, None)
    found = []
    for row, column in ((1, 1), (6, 2), (3, 13)):
        field = torch.zeros(1, 40, 3, 12, 20, dtype=x.dtype)
        field[..., row : row + 4, column : column + 5] = x
        with use_backend(backend):
            found.append(causal_conv3d(field, weight, bias)[..., row : row + 4, column : column + 5])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_fewer_products_are_as_accurate(batch, still, dtype, small_counts):
    for frames, products in zip(range(1, 6), (1, 4, 5, 8, 9) if still else (3, 4, 7, 8, 11), strict=True):
        args = channels_last(*make(batch, 24, 20, frames, 7, 9, still=still, residual=still, dtype=dtype, seed=frames))
        small_counts.clear()
        y = _minimal.forward(*args)
        assert sum(small_counts) == (products if batch == 1 else sum(small_counts))
        assert_as_accurate(
            y, reference.forward(*args), reference.forward(*(None if x is None else x.double() for x in args))
        )


def test_fewer_products_are_causal(small_counts):
    x, weight, bias, _ = channels_last(*make(1, 4, 5, 6, 6, 5))
    y = _minimal.forward(x, weight, bias, None)
    for frame in range(6):
        changed = x.clone()
        changed[:, :, 2 + frame] += 1
        assert torch.equal(_minimal.forward(changed, weight, bias, None)[:, :, :frame], y[:, :, :frame])


def test_a_frame_changes_no_earlier_one():
    x, weight, bias, _ = make(1, 4, 5, 4, 6, 5)
    y = causal_conv3d(x, weight, bias)
    x[:, :, 4] += 1  # the buffer's frame 4 is the chunk's frame 2
    z = causal_conv3d(x, weight, bias)
    changed = (y != z).transpose(0, 2).flatten(1).any(dim=1)
    assert changed.tolist() == [False, False, True, True]


def test_every_argument_gets_its_gradient():
    args = [t.requires_grad_() for t in make(1, 2, 3, 2, 3, 3, residual=True, dtype=torch.float64)]
    torch.autograd.gradcheck(torch.ops.cogvx.causal_conv3d, args)
    grads = reference.backward(torch.ones(1, 3, 2, 3, 3).double(), *args)
    assert grads[0][:, :, :2].abs().min() > 0  # the halo's


def test_the_residual_gets_the_gradient_itself_and_is_not_kept():
    x, weight, bias, residual = make(1, 2, 3, 2, 3, 3, residual=True)
    y = causal_conv3d(x, weight, bias, residual.requires_grad_())
    grad = torch.randn(1, 3, 2, 3, 3)
    assert torch.autograd.grad(y, residual, grad)[0].data_ptr() == grad.data_ptr()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda _: None):
        causal_conv3d(x, weight.requires_grad_(), bias, residual)
    assert x.data_ptr() in kept and residual.data_ptr() not in kept


@pytest.mark.parametrize("backend", OPS["causal_conv3d"].backends)
def test_the_sum_with_the_residual_is_rounded_once_on_gpus(backend, run_on):
    if backend in ON_CPUS:
        return
    # Triton's interpreter cuts bfloat16 off, but rounds float16.
    x, weight, bias, residual = make(1, 16, 8, 1, 5, 18, residual=True, dtype=torch.float16)
    run_on("causal_conv3d", backend, x, weight, bias, residual)
    exact = reference.forward(*(t.double() for t in (x, weight, bias, residual)))
    with use_backend(backend):
        error = (causal_conv3d(x, weight, bias, residual) - exact).abs()
    assert (error <= exact.abs() * 2**-11 + 1e-5).all()
