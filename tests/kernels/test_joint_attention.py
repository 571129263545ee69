"""`joint_attention` against a loop, and what packing must keep apart."""

import math

import numpy as np
import pytest
import torch

from cogvx_kernels import joint_attention, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.joint_attention.cases import make
from cogvx_kernels.testing import Normal, assert_as_accurate


def in_loops(q, k, v, lengths):
    b, a, n, e = q.shape
    y = np.zeros((b, n, a * e))
    ends = np.cumsum(lengths or [n])
    for i, j, row in np.ndindex(b, a, n):
        sample = int(np.searchsorted(ends, row, side="right"))
        seen = range(0 if sample == 0 else ends[sample - 1], ends[sample])
        scores = np.array([q[i, j, row] @ k[i, j, column] / math.sqrt(e) for column in seen])
        weights = np.exp(scores - scores.max())
        for weight, column in zip(weights / weights.sum(), seen, strict=True):
            y[i, row, j * e : (j + 1) * e] += weight * v[i, j, column]
    return y


def test_it_is_the_formula():
    for args in (make(2, 3, 5, 4, dtype=torch.float64), make(1, 2, 7, 5, [2, 1, 4], dtype=torch.float64)):
        expected = in_loops(*(x.numpy() if isinstance(x, torch.Tensor) else x for x in args))
        np.testing.assert_allclose(joint_attention(*args).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_packed_samples_equal_samples_alone():
    lengths = [7, 1, 11]
    q, k, v, _ = make(1, 3, sum(lengths), 16)
    alone = [joint_attention(*part) for part in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)]
    torch.testing.assert_close(joint_attention(q, k, v, lengths), torch.cat(alone, dim=1))


def test_a_sample_does_not_feel_another():
    q, k, v, lengths = make(1, 2, 12, 16, [5, 7])
    y = joint_attention(q, k, v, lengths)
    k[:, :, 5:] += 3
    v[:, :, 5:] -= 2
    z = joint_attention(q, k, v, lengths)
    assert torch.equal(y[:, :5], z[:, :5])
    assert not torch.equal(y[:, 5:], z[:, 5:])


def test_equal_keys_average_the_values():
    q, k, v, _ = make(1, 2, 6, 8, dtype=torch.float64)
    y = joint_attention(q, k[:, :, :1].expand_as(k).contiguous(), v)
    torch.testing.assert_close(y, v.mean(dim=2).flatten(1)[:, None].expand_as(y))


def test_the_order_of_keys_does_not_matter():
    q, k, v, _ = make(1, 2, 9, 8, dtype=torch.float64)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(joint_attention(q, k[:, :, order], v[:, :, order]), joint_attention(q, k, v))


@pytest.mark.parametrize("lengths", [None, [40, 1, 70, 20]])
@pytest.mark.parametrize("backend", OPS["joint_attention"].backends)
def test_many_tiles_make_the_same_sums(backend, lengths, run_on):
    args = make(1, 1, 131, 24, lengths)
    run_on("joint_attention", backend, *args)
    grad = Normal(torch.float32, "cpu", 1)(1, 131, 24)

    def result_and_gradients(name, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in args[:3]]
        with use_backend(name):
            y = joint_attention(*leaves, lengths)
            return y, *torch.autograd.grad(y, leaves, grad.to(dtype))

    found, eager = result_and_gradients(backend, torch.float32), result_and_gradients("reference", torch.float32)
    exact = result_and_gradients("reference", torch.float64)
    for what, a, b, c in zip(("result", "of q", "of k", "of v"), found, eager, exact, strict=True):
        assert_as_accurate(a, b, c, 2 if what == "result" else 3, what)
