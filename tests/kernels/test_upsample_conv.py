"""`upsample_conv` against a loop; which frames come twice."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cogvx_kernels import upsample_conv, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.upsample_conv import _minimal
from cogvx_kernels.upsample_conv.cases import SMALL, make
from cogvx_kernels.upsample_conv.taps import merge_taps, split_taps

ON_CPUS = ("reference", "minimal")  # whose sums may depend on the shape
FLOAT_AND_DOUBLE = (torch.float32, torch.float64)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", *OPS["upsample_conv"].backends])
def test_chunks_equal_one_pass(backend, dtype, run_on):
    if dtype not in (*OPS["upsample_conv"].dtypes(backend), *([torch.float64] if backend in ON_CPUS else [])):
        return
    args = make(1, 4, 6, 5, 3, 5, dtype=dtype)
    run_on("upsample_conv", backend, *args)
    with use_backend(backend):
        whole = upsample_conv(*args)
        chunks = torch.cat([upsample_conv(part, *args[1:]) for part in args[0].split([3, 2], dim=2)], dim=2)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps}[dtype]
    assert (chunks - whole).abs().max() <= (bound if backend in ON_CPUS else 0) * whole.abs().max()


def test_minimal_taps_of_a_hand_worked_kernel_and_their_gradient():
    weight = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])[None, None]
    assert merge_taps(weight)[0, 0].tolist() == [[1, 3, 5, 3], [5, 12, 16, 9], [11, 24, 28, 15], [7, 15, 17, 9]]
    torch.autograd.gradcheck(merge_taps, weight.double().requires_grad_())
    grad = torch.randn(1, 1, 4, 4)
    expected = torch.autograd.grad(merge_taps(weight.requires_grad_()), weight, grad)[0]
    torch.testing.assert_close(split_taps(grad), expected)


def test_phases_in_parts_of_any_length_are_the_same(monkeypatch):
    args = make(2, 3, 4, 7, 3, 5, True, dtype=torch.float64)
    whole = _minimal.forward(*args)
    for pixels in (1, 2 * 15 * 2, 2 * 15 * 3):  # one frame at a time, two, three
        monkeypatch.setattr(_minimal, "_PIXELS_AT_ONCE", pixels)
        torch.testing.assert_close(_minimal.forward(*args), whole)
    frames = F.interpolate(args[0].transpose(1, 2).flatten(0, 1), scale_factor=2.0)
    assert torch.equal(whole[:, :, 1], whole[:, :, 2])
    expected = F.conv2d(frames, args[1], args[2], padding=1)[0]
    torch.testing.assert_close(whole[0, :, 0], expected)


def test_frames_do_not_mix():
    x, weight, bias, _ = make(1, 3, 4, 4, 3, 3)
    y = upsample_conv(x, weight, bias, False)
    x[:, :, 2] += 1
    changed = (upsample_conv(x, weight, bias, False) != y).transpose(0, 2).flatten(1).any(dim=1)
    assert changed.tolist() == [False, False, True, False]


def test_a_sum_that_begins_with_a_large_bias_keeps_its_last_digits():
    x, weight, bias, _ = make(1, 40, 5, 1, 1, 3, scale=1e-2)
    y, exact = (upsample_conv(x.to(t), weight.to(t), torch.ones_like(bias, dtype=t), False) for t in FLOAT_AND_DOUBLE)
    assert (y - exact).abs().max() <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", OPS["upsample_conv"].backends)
def test_few_values_meet_the_taps_as_they_are(backend, run_on):
    op, few = OPS["upsample_conv"], make(1, 7, 2, 1, 1, 1, dtype=torch.bfloat16)
    run_on("upsample_conv", backend, *make(1, 8, 2, 1, 1, 1, dtype=torch.bfloat16))
    assert "8 values" in op.why_not(backend, *few)
    assert torch.equal(upsample_conv(*few), op.reference.forward(*few))
