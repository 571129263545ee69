"""`upsample_conv` against a loop; which frames come twice."""

import numpy as np
import torch

from cogvx_kernels import upsample_conv
from cogvx_kernels.upsample_conv.cases import SMALL, make


def in_loops(x, weight, bias, double_time):
    b, _, t, h, w = x.shape
    frames = list(range(t))
    if double_time:
        frames = [frame for frame in range(t) for _ in range(1 if t % 2 == 1 and frame == 0 else 2)]
    y = np.zeros((b, weight.shape[0], len(frames), 2 * h, 2 * w))
    for i, o, j, row, column in np.ndindex(*y.shape):
        y[i, o, j, row, column] = bias[o]
        for dy, dx in np.ndindex(3, 3):
            r, s = row + dy - 1, column + dx - 1
            if 0 <= r < 2 * h and 0 <= s < 2 * w:
                y[i, o, j, row, column] += x[i, :, frames[j], r // 2, s // 2] @ weight[o, :, dy, dx]
    return y


def test_it_is_the_formula():
    for case in (*SMALL[:2], *SMALL[3:]):
        args = case(dtype=torch.float64)
        expected = in_loops(*(x.numpy() if isinstance(x, torch.Tensor) else x for x in args))
        np.testing.assert_allclose(upsample_conv(*args).numpy(), expected, rtol=1e-11, atol=1e-12)


def test_frames_double_and_an_odd_first_one_stays_alone():
    x, weight, bias, _ = make(1, 3, 4, 3, 2, 2)
    once = upsample_conv(x, weight, bias, False)
    assert torch.equal(upsample_conv(x, weight, bias, True), once[:, :, [0, 1, 1, 2, 2]])
    assert torch.equal(upsample_conv(x[:, :, :2], weight, bias, True), once[:, :, [0, 0, 1, 1]])


def test_frames_do_not_mix():
    x, weight, bias, _ = make(1, 3, 4, 4, 3, 3)
    y = upsample_conv(x, weight, bias, False)
    x[:, :, 2] += 1
    changed = (upsample_conv(x, weight, bias, False) != y).transpose(0, 2).flatten(1).any(dim=1)
    assert changed.tolist() == [False, False, True, False]
