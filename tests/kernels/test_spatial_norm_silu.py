"""`spatial_norm_silu` against a loop and against the plain norm."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cogvx_kernels import group_norm_silu, spatial_norm_silu, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.spatial_norm_silu.cases import SMALL, make
from cogvx_kernels.spatial_norm_silu.reference import resize_nearest

BACKENDS = ["reference", *OPS["spatial_norm_silu"].backends]


@pytest.fixture(params=BACKENDS)
def backend(request, run_on):
    run_on("spatial_norm_silu", request.param, *make(1, 8, (5, 6, 8), 4, (3, 3, 4), 4))
    with use_backend(request.param):
        yield request.param


def in_loops(x, z, weight, bias, weight_y, bias_y, weight_b, bias_b, halo, num_groups, eps, num_halo, _):
    t, h, w = x.shape[2:]
    t_z, h_z, w_z = z.shape[2:]
    size = x.shape[1] // num_groups
    y = np.empty_like(x)
    for i, channel, frame, row, column in np.ndindex(*x.shape):
        group = x[i, channel // size * size : (channel // size + 1) * size]
        normal = (x[i, channel, frame, row, column] - group.mean()) / np.sqrt(group.var() + eps)
        normal = normal * weight[channel] + bias[channel]
        if t > 1 and t % 2 == 1:  # the first frame alone
            frame_z = 0 if frame == 0 else 1 + (frame - 1) * (t_z - 1) // (t - 1)
        else:
            frame_z = frame * t_z // t
        latent = z[i, :, frame_z, row * h_z // h, column * w_z // w]
        value = normal * (weight_y[channel] @ latent + bias_y[channel]) + weight_b[channel] @ latent + bias_b[channel]
        y[i, channel, frame, row, column] = value / (1 + np.exp(-value))
    front = [y[:, :, :1]] * num_halo if halo is None else [halo]
    return np.concatenate([*front, y], axis=2)


def test_it_is_the_formula():
    for case in (*SMALL[:3], *SMALL[4:]):
        args = case(dtype=torch.float64)
        expected = in_loops(*(x.numpy() if isinstance(x, torch.Tensor) else x for x in args))
        np.testing.assert_allclose(spatial_norm_silu(*args).numpy(), expected, rtol=1e-11, atol=1e-12)


def test_the_first_of_an_odd_number_of_frames_stands_alone():
    z = torch.arange(3.0)[None, None, :, None, None]
    assert resize_nearest(z, (5, 1, 1)).flatten().tolist() == [0, 1, 1, 2, 2]
    assert resize_nearest(z, (6, 1, 1)).flatten().tolist() == [0, 0, 1, 1, 2, 2]
    assert resize_nearest(z, (1, 1, 1)).flatten().tolist() == [0]


def test_the_convolutions_at_the_latents_size_equal_those_at_full_size(backend):
    args = make(1, 8, (5, 6, 8), 4, (3, 3, 4), 4)
    x, z, weight, bias, weight_y, bias_y, weight_b, bias_b, _, num_groups, eps, *_ = args
    full = resize_nearest(z, x.shape[2:])
    scale, shift = (F.conv3d(full, w[:, :, None, None, None], b) for w, b in ((weight_y, bias_y), (weight_b, bias_b)))
    expected = F.silu(F.group_norm(x, num_groups, weight, bias, eps) * scale + shift)
    y = spatial_norm_silu(x, z, weight, bias, weight_y, bias_y, weight_b, bias_b, None, num_groups, eps, 0)
    torch.testing.assert_close(y, expected)


def test_a_latent_that_says_nothing_leaves_the_plain_norm(backend):
    args = make(1, 8, (3, 4, 6), 3, (2, 2, 3), 4, halo=True)
    x, z, weight, bias, weight_y, bias_y, weight_b, bias_b, halo, *rest = args
    silent = torch.zeros_like(weight_y), torch.ones_like(bias_y), torch.zeros_like(weight_b), torch.zeros_like(bias_b)
    y = spatial_norm_silu(x, z, weight, bias, *silent, halo, *rest)
    torch.testing.assert_close(y, group_norm_silu(x, weight, bias, halo, *rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cuda", "triton"], indirect=True)
def test_a_latent_resized_before_gives_the_same_bits(backend, dtype):
    x, z, *rest = make(1, 8, (5, 6, 7), 4, (3, 3, 4), 4, dtype=dtype)
    assert torch.equal(spatial_norm_silu(x, resize_nearest(z, x.shape[2:]), *rest), spatial_norm_silu(x, z, *rest))
