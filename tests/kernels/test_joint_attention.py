"""`joint_attention` against a loop, and what packing must keep apart."""

import math

import numpy as np
import pytest
import torch

from cogvx_kernels import joint_attention, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.joint_attention.cases import make
from cogvx_kernels.testing import assert_as_accurate

each_backend = pytest.mark.parametrize("backend", ["reference", *OPS["joint_attention"].backends])


def in_loops(q, k, v, lengths, return_lse):
    b, a, n, e = q.shape
    y, lse = np.zeros((b, n, a * e)), np.zeros((b, a, n))
    ends = np.cumsum(lengths or [n])
    for i, j, row in np.ndindex(b, a, n):
        sample = int(np.searchsorted(ends, row, side="right"))
        seen = range(0 if sample == 0 else ends[sample - 1], ends[sample])
        scores = np.array([q[i, j, row] @ k[i, j, column] / math.sqrt(e) for column in seen])
        weights = np.exp(scores - scores.max())
        lse[i, j, row] = np.log(weights.sum()) + scores.max()
        for weight, column in zip(weights / weights.sum(), seen, strict=True):
            y[i, row, j * e : (j + 1) * e] += weight * v[i, j, column]
    return (y, lse) if return_lse else (y,)


def test_it_is_the_formula():
    for shape in ((2, 3, 5, 4), (2, 3, 5, 4, None, True), (1, 2, 7, 5, [2, 1, 4]), (1, 2, 7, 5, [2, 1, 4], True)):
        args = make(*shape, dtype=torch.float64)
        expected = in_loops(*(x.numpy() if isinstance(x, torch.Tensor) else x for x in args))
        found = joint_attention(*args)
        for one, truth in zip(found if args[-1] else (found,), expected, strict=True):
            np.testing.assert_allclose(one.numpy(), truth, rtol=1e-12, atol=1e-12)


@each_backend
def test_packed_samples_equal_samples_alone(backend, run_on):
    lengths = [7, 1, 150, 11]
    q, k, v, *_ = make(1, 2, sum(lengths), 16, dtype=OPS["joint_attention"].dtypes(backend)[0])
    run_on("joint_attention", backend, q, k, v, lengths, False)
    with use_backend(backend):
        alone = [joint_attention(*part) for part in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)]
        packed = joint_attention(q, k, v, lengths)
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


@each_backend
def test_a_sample_does_not_feel_another(backend, run_on):
    q, k, v, lengths, _ = make(1, 2, 12, 16, [5, 7], dtype=OPS["joint_attention"].dtypes(backend)[0])
    run_on("joint_attention", backend, q, k, v, lengths, False)
    with use_backend(backend):
        y = joint_attention(q, k, v, lengths)
        k[:, :, 5:] += 3
        v[:, :, 5:] -= 2
        z = joint_attention(q, k, v, lengths)
    assert torch.equal(y[:, :5], z[:, :5])
    assert not torch.equal(y[:, 5:], z[:, 5:])


def test_equal_keys_average_the_values():
    q, k, v, *_ = make(1, 2, 6, 8, dtype=torch.float64)
    y = joint_attention(q, k[:, :, :1].expand_as(k).contiguous(), v)
    torch.testing.assert_close(y, v.mean(dim=2).flatten(1)[:, None].expand_as(y))


def test_the_order_of_keys_does_not_matter():
    q, k, v, *_ = make(1, 2, 9, 8, dtype=torch.float64)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(joint_attention(q, k[:, :, order], v[:, :, order]), joint_attention(q, k, v))


def with_gradients(args):
    q, k, v = (x.detach().requires_grad_() for x in args[:3])
    y = joint_attention(q, k, v, *args[3:])
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, (q, k, v), grad)


each_backend_and_dtype = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (backend, dtype)
        for backend in ("reference", *OPS["joint_attention"].backends)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if dtype in OPS["joint_attention"].dtypes(backend)
    ],
    ids=str,
)


@each_backend_and_dtype
def test_many_tiles_of_keys_whose_scores_grow(backend, dtype, run_on):
    q, k, v, lengths, _ = make(1, 1, 391, 64, [300, 91], dtype=dtype)
    k = k * torch.linspace(0.1, 4, k.shape[2], dtype=dtype)[:, None]
    args = q, k, v, lengths, False
    run_on("joint_attention", backend, *args)
    with use_backend("reference"):
        eager, exact = with_gradients(args), with_gradients((q.double(), k.double(), v.double(), *args[3:]))
    with use_backend(backend):
        found = with_gradients(args)
    for name, *values in zip(("y", "grad_q", "grad_k", "grad_v"), found, eager, exact, strict=True):
        assert_as_accurate(*values, 2 if name == "y" else 3, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, run_on):
    args = make(1, 2, 391, 40, [300, 91], dtype=dtype)
    run_on("joint_attention", "native", *args)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with use_backend("native"):
                found.append(with_gradients(args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


@each_backend_and_dtype
def test_a_nan_spoils_what_depends_on_it_alone(backend, dtype, run_on):
    q, k, v, *_ = make(1, 2, 200, 16, dtype=dtype)
    q[0, 0, 5], v[0, 1, 150, 3] = float("nan"), float("nan")
    run_on("joint_attention", backend, q, k, v, None, False)
    with use_backend(backend):
        bad = joint_attention(q, k, v).isnan()[0].unflatten(1, (2, 16))
    assert bad[5, 0].all()
    assert bad[:, 1, 3].all()
    assert bad.sum() == 16 + 200


@each_backend
def test_a_score_of_minus_infinity_gets_no_weight(backend, run_on):
    q, k, v, *_ = make(1, 1, 150, 8, dtype=OPS["joint_attention"].dtypes(backend)[0])
    q[..., 0], k[:, :, :140, 0] = 1e30, -1e30
    run_on("joint_attention", backend, q, k, v, None, False)
    with use_backend(backend):
        y, *_ = with_gradients((q, k, v))
    assert y.isfinite().all()


def merged(q, k, v, pieces, attend):
    """Attention over pieces of the keys, one after another: what a ring of processes does."""
    y = lse = None
    for keys, values in zip(k.tensor_split(pieces, dim=2), v.tensor_split(pieces, dim=2), strict=True):
        parts = [attend(queries, keys, values, None, True) for queries in q.tensor_split(pieces, dim=2)]
        y_new, lse_new = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 2)
        if y is None:
            y, lse = y_new, lse_new
            continue
        both = torch.logaddexp(lse, lse_new)
        old, new = (of.sub(both).exp().transpose(1, 2)[..., None] for of in (lse, lse_new))
        heads = q.shape[1]
        y = (old * y.unflatten(2, (heads, -1)) + new * y_new.unflatten(2, (heads, -1))).flatten(2)
        lse = both
    return y, lse


@each_backend_and_dtype
def test_halves_of_the_keys_merge_to_the_whole(backend, dtype, run_on):
    args = make(1, 2, 84, 64, dtype=dtype)[:3]
    run_on("joint_attention", backend, *args, None, True)

    def found_by(attend, args):
        leaves = [x.detach().requires_grad_() for x in args]
        y, lse = attend(*leaves)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (y, lse)]
        return [x.detach() for x in (y, lse, *torch.autograd.grad((y, lse), leaves, grads))]

    def whole(*args):
        return joint_attention(*args, return_lse=True)

    def in_halves(*args):
        y, lse = merged(*args, 2, joint_attention)
        return y.to(args[0].dtype), lse

    with use_backend("reference"):
        eager, exact = found_by(in_halves, args), found_by(whole, [x.double() for x in args])
    with use_backend(backend):
        found = found_by(in_halves, args)
    for name, *values in zip(("y", "lse", "grad_q", "grad_k", "grad_v"), found, eager, exact, strict=True):
        assert_as_accurate(*values, 2 if name in ("y", "lse") else 3, name)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("lengths", [None, [2, 3]], ids=str)
def test_gradients_of_both_results_are_those_of_differences(backend, lengths, run_on):
    *args, _ = make(1, 2, 5, 8, lengths, True, dtype=torch.float64)
    run_on("joint_attention", backend, *args, True)
    leaves = [x.requires_grad_() for x in args[:3]]
    with use_backend(backend):
        torch.autograd.gradcheck(lambda q, k, v: joint_attention(q, k, v, lengths, return_lse=True), leaves)


@each_backend
def test_a_row_without_a_finite_score_has_the_logarithm_of_nothing(backend, run_on):
    q, k, v, *_ = make(1, 1, 70, 8, dtype=OPS["joint_attention"].dtypes(backend)[0])
    q[..., 0], k[..., 0] = 1e30, -1e30
    run_on("joint_attention", backend, q, k, v, None, True)
    with use_backend(backend):
        lse = joint_attention(q, k, v, return_lse=True)[1]
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))
