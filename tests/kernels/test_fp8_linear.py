"""Products in fp8: the rounding by hand, how near they come, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F

from cogvx_kernels import fp8_linear, rows_in_fp8
from cogvx_kernels._fp8 import multiplies_in_fp8
from cogvx_kernels.testing import devices


def rounded(value: float, largest: float) -> float:
    """What e4m3 keeps of one value of a row whose largest magnitude is given, worked out number by number."""
    scale = largest / 448 or 1.0
    magnitude = abs(value) / scale
    step = 2.0 ** (max(math.floor(math.log2(magnitude)), -6) - 3) if magnitude else 1.0
    return math.copysign(round(magnitude / step) * step * scale, value)  # `round` takes the even one of two


def rows(*shape, dtype=torch.float32, seed=0):
    """Rows of very different sizes, one of them of zeros, each with an outlier."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x *= torch.logspace(-3, 0, shape[-2])[:, None]
    x[..., 1] *= 20
    x[..., 2, :] = 0
    return x.to(dtype)


def test_every_number_is_the_nearest_that_there_is():
    x = rows(9, 130)
    numbers, scale = rows_in_fp8(x)
    assert numbers.dtype == torch.float8_e4m3fn and scale.shape == (9, 1) and scale.dtype == torch.float32
    by_hand = torch.tensor([[rounded(v, max(map(abs, row))) for v in row] for row in x.double().tolist()])
    found = numbers.double() * scale.double()
    # Where a quotient lies between two numbers, its own rounding in fp32 may decide.
    same = (found - by_hand).abs() <= 1e-6 * by_hand.abs()
    assert same.float().mean() > 0.99 and bool(((found - by_hand).abs() <= by_hand.abs() / 7.9)[~same].all())
    assert bool((found[2] == 0).all()) and found.abs().amax(1)[3] == pytest.approx(float(x[3].abs().max()), rel=1e-6)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("torchs_own", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_that_of_the_rounded_numbers_and_near_the_exact_one(dtype, torchs_own, device, monkeypatch):
    """PyTorch's own product, which GPUs run, is on CPUs too, where it is of no use but this one; it asks for less."""
    if torchs_own and device == "cuda" and not multiplies_in_fp8(torch.device("cuda", 0)):
        pytest.skip("this GPU does not multiply in fp8")
    monkeypatch.setattr("cogvx_kernels._fp8.multiplies_in_fp8", lambda device: torchs_own)
    given, product = [], torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **how: given.append(args) or product(*args, **how))
    x, weight = rows(2, 7, 64, dtype=dtype).to(device), rows(48, 64, dtype=dtype, seed=1).to(device)
    bias = torch.randn(48, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    (x8, x_scale), (weight8, scale) = rows_in_fp8(x.flatten(0, 1)), rows_in_fp8(weight)
    tokens, weights = x8.double() * x_scale, weight8.double() * scale
    of_rounded = tokens @ weights.t() + bias.double()
    y = fp8_linear(x, weight8, scale, bias)
    assert y.shape == (2, 7, 48) and y.dtype == dtype
    for tokens_given, weight_given, *scales, _ in given:
        assert tokens_given.is_contiguous() and weight_given.t().is_contiguous()
        assert all(scale.dtype == torch.float32 and scale.is_contiguous() for scale in scales)
    assert len(given) == torchs_own
    found = y.flatten(0, 1).double()
    low = torch.bfloat16 if torchs_own else dtype
    sizes = tokens.abs() @ weights.t().abs() + bias.double().abs()
    rounding = torch.finfo(low).eps * (of_rounded.abs() + bias.double().abs()) + 1e-5 * sizes
    assert bool(((found - of_rounded).abs() <= rounding).all())
    # A 16th of a value at most, or 2^-10 of its scale.
    exact = x.flatten(0, 1).double()
    bound = torch.maximum(exact.abs() / 16, x_scale * 2**-10) @ weights.t().abs() * 1.001 + rounding
    assert bool(((found - exact @ weights.t() - bias.double()).abs() <= bound).all())
    assert torch.equal(fp8_linear(x, weight8, scale, bias, gelu=True), F.gelu(y, approximate="tanh"))


def test_a_row_does_not_depend_on_the_others_and_what_is_not_finite_stays_so():
    weight, scale = rows_in_fp8(rows(48, 64, seed=1))
    x = rows(70, 64)
    whole = fp8_linear(x, weight, scale)
    assert torch.equal(fp8_linear(x * 2.0 ** torch.arange(70).sub(35)[:, None], weight, scale),
                       whole * 2.0 ** torch.arange(70).sub(35)[:, None])  # fmt: skip
    for wrong in (math.nan, math.inf):
        x[4, 5] = wrong
        found = fp8_linear(x, weight, scale)
        assert bool(found[4].isnan().all()) and torch.equal(found[5:], whole[5:])
    assert fp8_linear(x[:0], weight, scale).shape == (0, 48)


def test_what_cannot_be():
    weight, scale = rows_in_fp8(torch.randn(6, 4))
    x = torch.randn(3, 4)
    for args, message in (
        ((x[:, :3], weight, scale), r"weight must be \[K, 3\] of torch.float8_e4m3fn"),
        ((x, weight.float(), scale), "weight must be .* got .* of torch.float32"),
        ((x.long(), weight, scale), "x must be a tensor of rows in a floating dtype"),
        ((x, weight, scale[:2]), r"scale must be \[6, 1\], got \[2, 1\]"),
        ((x, weight, scale, torch.ones(4)), r"bias must be \[6\], got \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            fp8_linear(*args)
    with pytest.raises(RuntimeError, match="fp8_linear is for inference: it has no gradient"):
        fp8_linear(x.requires_grad_(), weight, scale)


@pytest.mark.parametrize("torchs_own", [True, False])
def test_strided_tokens_and_weights_and_one_token_give_the_same(torchs_own, monkeypatch):
    monkeypatch.setattr("cogvx_kernels._fp8.multiplies_in_fp8", lambda device: torchs_own)
    x, (weight, scale) = rows(32, 64), rows_in_fp8(rows(48, 64, seed=1))
    y = fp8_linear(x, weight, scale)
    assert torch.equal(fp8_linear(x.t().contiguous().t(), weight.t().contiguous().t(), scale), y)
    assert rows_in_fp8(x.t().contiguous().t())[0].is_contiguous()
    assert fp8_linear(x[3], weight, scale).shape == (48,)
    torch.testing.assert_close(fp8_linear(x[3], weight, scale), y[3])
