"""`causal_conv3d_moments`: what it measures, who takes it, and that a norm then reads nothing twice."""

import host_cuda
import pytest
import torch

from cogvx_kernels import (
    _extension,
    causal_conv3d,
    causal_conv3d_for_norm,
    causal_conv3d_moments,
    group_norm_silu,
    use_backend,
)
from cogvx_kernels._op import OPS
from cogvx_kernels.causal_conv3d_moments.cases import make
from cogvx_kernels.testing import assert_as_accurate

each_backend = pytest.mark.parametrize("backend", ["reference", *OPS["causal_conv3d_moments"].backends])


@each_backend
def test_they_are_those_of_the_result(backend, run_on):
    args = make(2, 8, 40, 3, 19, 37, residual=True, dtype=OPS["causal_conv3d_moments"].dtypes(backend)[0])
    run_on("causal_conv3d_moments", backend, *args)
    with use_backend(backend):
        y, moments = causal_conv3d_moments(*args)
        plain = causal_conv3d(*args)
    values = y.double().flatten(2)
    expected = torch.stack([values.mean(2), values.var(2, correction=0)], 1)
    torch.testing.assert_close(moments.double(), expected, rtol=1e-5, atol=1e-6)
    if backend == "cuda":
        assert torch.equal(y, plain)


@each_backend
def test_a_large_mean_costs_no_accuracy(backend, run_on):
    x, weight, _, _ = make(1, 8, 8, 2, 33, 70, dtype=OPS["causal_conv3d_moments"].dtypes(backend)[0])
    run_on("causal_conv3d_moments", backend, x, weight, None, None)
    with use_backend(backend):
        y, moments = causal_conv3d_moments(x, weight, torch.full_like(weight[:, 0, 0, 0, 0], 64.0))
    variance = y.double().flatten(2).var(2, correction=0)
    torch.testing.assert_close(moments[:, 1].double(), variance, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_norm_that_takes_them_is_as_accurate(dtype, run_on):
    args = make(1, 8, 32, 2, 17, 40, dtype=dtype)
    run_on("causal_conv3d_moments", "cuda", *args)
    weight, bias = torch.ones(32, dtype=dtype), torch.zeros(32, dtype=dtype)
    with use_backend("cuda"):
        x, moments = causal_conv3d_moments(*args)
        found = group_norm_silu(x, weight, bias, None, 4, 1e-6, 2, moments)
    with use_backend("reference"):
        eager = group_norm_silu(x, weight, bias, None, 4, 1e-6, 2)
        exact = group_norm_silu(x.double(), weight.double(), bias.double(), None, 4, 1e-6, 2)
    assert_as_accurate(found, eager, exact)


def kernels_of(call):
    """The names of the kernels that a call launches on the host."""
    machine = host_cuda.Machine(host_cuda.build())
    machine.launches()
    call()
    return [name.split("<")[0].split("::")[-1] for name, *_ in machine.launches()]


def test_a_norm_that_takes_them_reads_x_once(run_on):
    args = make(1, 8, 32, 1, 5, 6, dtype=torch.bfloat16)
    run_on("causal_conv3d_moments", "cuda", *args)
    if args[0].is_cuda or _extension._on_host is None:
        pytest.skip("kernels are counted where they run on the host")
    weight, bias = torch.ones(32, dtype=torch.bfloat16), torch.zeros(32, dtype=torch.bfloat16)
    with use_backend("cuda"), torch.no_grad():
        x, moments = causal_conv3d_for_norm(*args)
        alone = kernels_of(lambda: group_norm_silu(x, weight, bias, None, 4, 1e-6, 2))
        found = kernels_of(lambda: group_norm_silu(x, weight, bias, None, 4, 1e-6, 2, moments))
    assert alone == ["moments_kernel", "finish_kernel", "apply_kernel"]
    assert found == ["groups_kernel", "apply_kernel"]


def test_where_nothing_measures_the_norm_is_left_to_itself(run_on):
    args = make(1, 8, 8, 1, 5, 6)
    with use_backend("reference"):
        y, moments = causal_conv3d_for_norm(*args)
        assert moments is None and torch.equal(y, causal_conv3d(*args))
    args = make(1, 8, 8, 1, 5, 6, dtype=torch.bfloat16)
    run_on("causal_conv3d_moments", "cuda", *args)
    with use_backend("cuda"):
        assert causal_conv3d_for_norm(*args)[1] is not None
        args[1].requires_grad_()
        assert causal_conv3d_for_norm(*args)[1] is None
