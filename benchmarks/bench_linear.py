"""`linear` at the sizes of the 2B model; plain PyTorch takes oneDNN for bf16 products itself, and MKL for fp32 ones."""

import cost
import pytest
import torch
from conftest import DEVICE, TOKENS_ON_CPU, skip_unless_live

from cogvx_kernels import linear, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.linear.cases import REAL
from cogvx_kernels.testing import assert_as_accurate

pytestmark = pytest.mark.products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", ["reference", *OPS["linear"].backends])
def test_forward(measure, backend, case, dtype):
    batch, tokens, *rest = REAL[case].args
    args = REAL[case].func(batch, tokens if DEVICE == "cuda" else TOKENS_ON_CPU, *rest, dtype=dtype, device=DEVICE)
    skip_unless_live("linear", backend, *args)
    x = args[0]
    group = f"linear {case} {list(x.shape)} {dtype}"
    y = measure(group, backend, lambda: linear(*args), cost.of("linear", args))
    few = (x[:, :100], *args[1:])
    with use_backend("reference"):
        exact = linear(*(t.double() if torch.is_tensor(t) else t for t in few))
        assert_as_accurate(y[:, :100], linear(*few), exact)
