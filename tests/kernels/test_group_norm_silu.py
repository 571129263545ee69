"""`group_norm_silu` against a loop; its halo."""

import numpy as np
import pytest
import torch

from cogvx_kernels import group_norm_silu, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.group_norm_silu.cases import SMALL, make

BACKENDS = ["reference", *OPS["group_norm_silu"].backends]


@pytest.fixture(params=BACKENDS)
def backend(request, run_on):
    run_on("group_norm_silu", request.param, *make(1, 8, 3, 4, 5, 4))
    with use_backend(request.param):
        yield request.param


def in_loops(x, weight, bias, halo, num_groups, eps, num_halo, _):
    b, c = x.shape[:2]
    size = c // num_groups
    y = np.empty_like(x)
    for i, group in np.ndindex(b, num_groups):
        channels = range(group * size, (group + 1) * size)
        values = np.concatenate([x[i, channel].ravel() for channel in channels])
        for channel in channels:
            normal = (x[i, channel] - values.mean()) / np.sqrt(values.var() + eps) * weight[channel] + bias[channel]
            y[i, channel] = normal / (1 + np.exp(-normal))
    front = [y[:, :, :1]] * num_halo if halo is None else [halo]
    return np.concatenate([*front, y], axis=2)


def test_it_is_the_formula():
    for case in SMALL:
        args = case(dtype=torch.float64)
        expected = in_loops(*(x.numpy() if isinstance(x, torch.Tensor) else x for x in args))
        np.testing.assert_allclose(group_norm_silu(*args).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_the_halo_is_copied_and_does_not_enter_the_statistics(backend):
    x, weight, bias, halo, num_groups, eps, num_halo, _ = make(1, 8, 3, 4, 5, 4, halo=True)
    y = group_norm_silu(x, weight, bias, halo, num_groups, eps, num_halo)
    assert torch.equal(y[:, :, :2], halo)
    assert torch.equal(y[:, :, 2:], group_norm_silu(x, weight, bias, None, num_groups, eps, 0))


def test_without_a_halo_the_first_frame_stands_before_itself(backend):
    x, weight, bias, _, num_groups, eps, *_ = make(1, 8, 3, 4, 5, 4)
    y = group_norm_silu(x, weight, bias, None, num_groups, eps, 2)
    assert torch.equal(y[:, :, 0], y[:, :, 2])
    assert torch.equal(y[:, :, 1], y[:, :, 2])


def test_scale_and_offset_of_a_chunk_do_not_matter():
    x, *rest = make(1, 8, 2, 4, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(group_norm_silu(100 * x + 7, *rest), group_norm_silu(x, *rest), rtol=1e-5, atol=1e-5)


def test_float32_weights_beside_a_low_precision_chunk(backend):
    x, weight, bias, *rest = make(1, 8, 2, 4, 5, 4)
    y = group_norm_silu(x.bfloat16(), weight, bias, *rest)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), group_norm_silu(x, weight, bias, *rest), rtol=2e-2, atol=2e-2)
