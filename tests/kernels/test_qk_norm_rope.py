"""`qk_norm_rope` against a loop, and what a rotation of pairs must leave alone."""

import math

import numpy as np
import pytest
import torch

from cogvx_kernels import qk_norm_rope, use_backend
from cogvx_kernels.qk_norm_rope.cases import make
from cogvx_kernels.testing import devices


def in_loops(qkv, q_weight, q_bias, k_weight, k_bias, cos, sin, num_text, num_heads, eps):
    b, n, width = qkv.shape
    e = width // (3 * num_heads)
    results = [np.empty((b, num_heads, n, e)) for _ in range(3)]
    norms = (q_weight, q_bias), (k_weight, k_bias), (None, None)
    for i, (y, (weight, bias)) in enumerate(zip(results, norms, strict=True)):
        for index in np.ndindex(b, num_heads, n):
            start = (i * num_heads + index[1]) * e
            row = qkv[index[0], index[2], start : start + e]
            if weight is not None:
                row = (row - row.mean()) / math.sqrt(row.var() + eps) * weight + bias
                p = index[2] - num_text
                if cos is not None and p >= 0:
                    # A pair is a complex number that turns by its angle.
                    pairs = (row[0::2] + 1j * row[1::2]) * (cos[p, 0::2] + 1j * sin[p, 0::2])
                    row = np.stack([pairs.real, pairs.imag], axis=1).reshape(e)
            y[index] = row
    return results


def to_numpy(args):
    return [x.numpy() if isinstance(x, torch.Tensor) else x for x in args]


def test_it_is_the_formula():
    for args in (make(2, 5, 2, 3, 8, dtype=torch.float64), make(1, 4, 1, 2, 5, rope=False, dtype=torch.float64)):
        for y, expected in zip(qk_norm_rope(*args), in_loops(*to_numpy(args)), strict=True):
            np.testing.assert_allclose(y.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_scores_depend_on_relative_positions_alone():
    tokens, e = 6, 8
    qkv, *norms = make(1, tokens, 0, 1, e, rope=False, dtype=torch.float64)[:5]
    qkv = qkv[:, :1].expand(-1, tokens, -1)  # the same token at every position
    angles = (torch.arange(tokens).double()[:, None] * 0.7 ** torch.arange(e // 2)).repeat_interleave(2, dim=1)
    q, k, _ = qk_norm_rope(qkv, *norms, angles.cos(), angles.sin(), 0, 1, 1e-6)
    scores = (q @ k.transpose(2, 3))[0, 0]
    for offset in range(1 - tokens, tokens):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(scores[0, 1], scores[0, 2])


def test_text_is_not_rotated_and_v_is_only_rearranged():
    args = list(make(2, 7, 3, 2, 8))
    q, k, v = qk_norm_rope(*args)
    plain = qk_norm_rope(*args[:5], None, None, *args[7:])
    for y, z in zip((q, k), plain[:2], strict=True):
        assert torch.equal(y[:, :, :3], z[:, :, :3])
        assert not torch.equal(y[:, :, 3:], z[:, :, 3:])
    assert torch.equal(v, args[0][..., 32:].unflatten(2, (2, 8)).transpose(1, 2))
    assert all(y.is_contiguous() for y in (q, k, v))


def test_rotation_keeps_lengths_and_angle_zero_does_nothing():
    args = list(make(1, 7, 0, 2, 8, dtype=torch.float64))
    plain = qk_norm_rope(*args[:5], None, None, *args[7:])
    torch.testing.assert_close(qk_norm_rope(*args)[0].norm(dim=3), plain[0].norm(dim=3))
    args[5:7] = torch.ones_like(args[5]), torch.zeros_like(args[6])
    for y, z in zip(qk_norm_rope(*args), plain, strict=True):
        torch.testing.assert_close(y, z, rtol=0, atol=0)


# Triton's interpreter cuts bf16 off where a GPU rounds.
ROUNDING = [("native", torch.bfloat16, "cpu"), ("native", torch.float16, "cpu")] + [
    (backend, dtype, devices()[-1])
    for backend, dtype in (("cuda", torch.bfloat16), ("cuda", torch.float16), ("triton", torch.float16))
]
ROUNDING += [("triton", torch.bfloat16, devices()[-1])] if devices()[-1] != "cpu" else []


@pytest.mark.parametrize(("backend", "dtype", "device"), ROUNDING)
def test_angles_in_16_bits_round_every_product_and_sum(backend, dtype, device, run_on):
    args = make(1, 40, 4, 2, 64, narrow=True, dtype=dtype, device=device)
    run_on("qk_norm_rope", backend, *args)
    with use_backend(backend):
        turned = qk_norm_rope(*args)[0].float()
        plain = qk_norm_rope(*args[:5], None, None, *args[7:])[0][:, :, 4:]  # in 16 bits, as it is turned
        wide = qk_norm_rope(*args[:5], args[5].float(), args[6].float(), *args[7:])[0].float()
    across = torch.stack([-plain[..., 1::2], plain[..., ::2]], dim=-1).flatten(-2)
    expected = (plain * args[5] + across * args[6]).float()
    assert torch.equal(turned[:, :, 4:], expected)
    assert 0.2 < (wide[:, :, 4:] != expected).double().mean() < 0.9
