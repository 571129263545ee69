"""`int8_joint_attention` against a loop, and how far int8 takes it from exact attention: the bar of its docstring."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cogvx_kernels import int8_joint_attention, joint_attention, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.int8_joint_attention.cases import make
from cogvx_kernels.int8_joint_attention.reference import KEYS, QUERIES, quantize
from cogvx_kernels.testing import Normal

OP = OPS["int8_joint_attention"]
BACKENDS = ["reference", *OP.backends]
BACKENDS_AND_DTYPES = [(backend, dtype) for backend in BACKENDS for dtype in OP.dtypes(backend)]
DISTANCE, COSINE = 2e-2, 0.999  # to exact attention


@pytest.fixture(params=BACKENDS)
def backend(request, run_on):
    run_on("int8_joint_attention", request.param, *make(1, 1, 4, 8, dtype=OP.dtypes(request.param)[0]))
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def dtype(backend):
    return OP.dtypes(backend)[0]


def round_in_loops(x, size):
    """x as int8 would keep it: a scale for each `size` tokens of a head."""
    y = np.empty_like(x)
    for b, a, first in np.ndindex(x.shape[0], x.shape[1], -(-x.shape[2] // size)):
        rows = slice(first * size, (first + 1) * size)
        scale = max(abs(value) for value in x[b, a, rows].flat) / 127
        y[b, a, rows] = np.rint(x[b, a, rows] / scale) * scale
    return y


def in_loops(q, k, v):
    b, a, n, e = q.shape
    y = np.zeros((b, n, a * e))
    q, k = round_in_loops(q, 128), round_in_loops(k - k.mean(2, keepdims=True), 64)
    for i, j, row in np.ndindex(b, a, n):
        scores = np.array([q[i, j, row] @ k[i, j, column] / math.sqrt(e) for column in range(n)])
        weights = np.exp(scores - scores.max())
        for weight, column in zip(weights / weights.sum(), range(n), strict=True):
            y[i, row, j * e : (j + 1) * e] += weight * v[i, j, column]
    return y


def test_it_is_the_formula():
    for args in (make(2, 2, 5, 4, dtype=torch.float64), make(1, 1, 131, 3, dtype=torch.float64)):
        expected = in_loops(*(x.numpy() for x in args))
        np.testing.assert_allclose(int8_joint_attention(*args).numpy(), expected, rtol=1e-6, atol=1e-6)


def test_whole_numbers_up_to_127_are_exact(backend, dtype):
    q = torch.tensor([[127.0, 3.0], [-2.0, 50.0], [0.0, 1.0]], dtype=dtype)[None, None].repeat(1, 1, 1, 4) / 32
    k = torch.tensor([[127.0, -9.0], [-100.0, 4.0], [-27.0, 5.0]], dtype=dtype)[None, None].repeat(1, 1, 1, 4) / 32
    v = torch.randn(1, 1, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert not k.sum(2).any()  # of mean zero
    torch.testing.assert_close(int8_joint_attention(q, k, v), joint_attention(q, k, v))


def with_means(tokens, width, std, dtype):
    """q, k and v of two heads; every channel of k has a mean of its own, of this size."""
    normal = Normal(torch.float32, "cpu", 0)
    q, k, v = (normal(1, 2, tokens, width) for _ in range(3))
    return [x.to(dtype) for x in (q, k + std * normal(1, 2, 1, width), v)]


def to_exact(y, q, k, v):
    """How far y is from exact attention, and the cosine between them."""
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(1, 2).flatten(2)
    distance = (y.double() - exact).norm() / exact.norm()
    return distance.item(), F.cosine_similarity(y.double().flatten(), exact.flatten(), dim=0).item()


@pytest.mark.parametrize("mean", [0, 1, 30])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES, indirect=["backend"], ids=str)
def test_it_is_close_to_exact_attention(backend, dtype, mean):
    q, k, v = with_means(300, 64, mean, dtype)
    distance, cosine = to_exact(int8_joint_attention(q, k, v), q, k, v)
    assert distance <= DISTANCE
    assert cosine >= COSINE


def test_without_smoothing_the_bar_is_missed():
    q, k, v = with_means(300, 64, 30, torch.float32)

    def rounded(x, size):
        integers, scales = quantize(x, size)
        return integers * scales.repeat_interleave(size, dim=2)[:, :, : x.shape[2], None]

    y = F.scaled_dot_product_attention(rounded(q, QUERIES), rounded(k, KEYS), v).transpose(1, 2).flatten(2)
    distance, cosine = to_exact(y, q, k, v)
    assert distance > 5 * DISTANCE
    assert cosine < COSINE


def test_a_vector_added_to_every_key_changes_nothing(backend, dtype):
    q, k, v = make(1, 1, 128, 16, dtype=dtype)
    k = (k * 2).round() / 2  # so that the sums and, of 128 keys, the means are exact
    torch.testing.assert_close(int8_joint_attention(q, k + 64, v), int8_joint_attention(q, k, v))


def test_groups_of_zeros_and_equal_keys_average_the_values(backend, dtype):
    q, k, v = make(1, 1, 70, 8, dtype=dtype)
    expected = v.mean(dim=2).flatten(1)[:, None].expand(1, 70, 8)
    torch.testing.assert_close(int8_joint_attention(torch.zeros_like(q), k, v), expected)
    torch.testing.assert_close(int8_joint_attention(q, torch.ones_like(k), v), expected)


@pytest.mark.parametrize("name", BACKENDS[1:])  # torch's own attention takes a NaN in q for a row that sees nothing
def test_a_kernel_hides_no_nan(name, run_on):
    for argument in range(3):
        args = make(1, 1, 9, 8, dtype=OP.dtypes(name)[0])
        args[argument][0, 0, 4, 2] = float("nan")
        run_on("int8_joint_attention", name, *args)
        with use_backend(name):
            assert int8_joint_attention(*args)[0, 4].isnan().any()


def test_a_gradient_is_refused(backend, dtype):
    q, k, v = (x.requires_grad_() for x in make(1, 1, 5, 8, dtype=dtype))
    y = int8_joint_attention(q, k, v)
    with pytest.raises(RuntimeError, match="int8_joint_attention is for inference: it has no gradient"):
        y.sum().backward()
