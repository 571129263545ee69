"""`downsample_conv` against a loop; which pixels a result sees."""

import numpy as np
import pytest
import torch

from cogvx_kernels import downsample_conv, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.downsample_conv.cases import SMALL, make

ON_CPUS = ("reference", "minimal")  # whose sums may depend on the shape
FLOAT_AND_DOUBLE = (torch.float32, torch.float64)


def in_loops(x, weight, bias):
    b, _, t, h, w = x.shape
    y = np.zeros((b, len(weight), t, h // 2, w // 2))
    for i, o, j, row, column in np.ndindex(*y.shape):
        y[i, o, j, row, column] = bias[o]
        for k, n in np.ndindex(3, 3):
            r, s = 2 * row + k, 2 * column + n
            if r < h and s < w:
                y[i, o, j, row, column] += x[i, :, j, r, s] @ weight[o, :, k, n]
    return y


@pytest.mark.parametrize("backend", ["reference", "minimal"])
def test_it_is_the_formula(backend):
    for case in SMALL:
        args = case(dtype=torch.float64)
        with use_backend(backend):
            y = downsample_conv(*args).numpy()
        np.testing.assert_allclose(y, in_loops(*(x.numpy() for x in args)), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", *OPS["downsample_conv"].backends])
def test_a_result_sees_its_own_pixels_and_those_below_and_to_the_right(backend, run_on):
    x, weight, bias = make(1, 8, 8, 1, 6, 7, dtype=torch.bfloat16)
    run_on("downsample_conv", backend, x, weight, bias)
    with use_backend(backend):
        y = downsample_conv(x, weight, bias)
        for row, column, rows, columns in (
            (0, 0, [0], [0]),
            (2, 3, [0, 1], [1]),
            (5, 6, [2], [2]),
            (4, 1, [1, 2], [0]),
        ):
            other = x.clone()
            other[..., row, column] += 1
            changed = (downsample_conv(other, weight, bias) != y)[0, :, 0].any(dim=0)
            expected = torch.zeros(3, 3, dtype=torch.bool)
            expected[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
            assert torch.equal(changed, expected), (row, column)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", *OPS["downsample_conv"].backends])
def test_chunks_equal_one_pass(backend, dtype, run_on):
    if dtype not in (*OPS["downsample_conv"].dtypes(backend), *([torch.float64] if backend in ON_CPUS else [])):
        return
    args = make(1, 4, 6, 5, 6, 5, dtype=dtype)
    run_on("downsample_conv", backend, *args)
    with use_backend(backend):
        whole = downsample_conv(*args)
        chunks = torch.cat([downsample_conv(part, *args[1:]) for part in args[0].split([3, 2], dim=2)], dim=2)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps}[dtype]
    assert (chunks - whole).abs().max() <= (bound if backend in ON_CPUS else 0) * whole.abs().max()


def test_every_argument_gets_its_gradient():
    for height, width in ((4, 5), (5, 4), (2, 2)):
        args = [t.requires_grad_() for t in make(1, 2, 3, 2, height, width, dtype=torch.float64)]
        torch.autograd.gradcheck(torch.ops.cogvx.downsample_conv, args)


def test_frames_of_one_row_are_refused():
    x, weight, bias = make(1, 2, 3, 1, 2, 2)
    with pytest.raises(ValueError, match=r"^downsample_conv: x must be of .* 2 x 2 pixels, got \[1, 2, 1, 1, 2\]"):
        downsample_conv(x[..., :1, :], weight, bias)


def test_a_sum_that_begins_with_a_large_bias_keeps_its_last_digits():
    x, weight, bias = make(1, 17, 16, 1, 12, 10, scale=1e-2)
    y, exact = (downsample_conv(x.to(t), weight.to(t), torch.ones_like(bias, dtype=t)) for t in FLOAT_AND_DOUBLE)
    assert (y - exact).abs().max() <= torch.finfo(torch.float32).eps
