"""`int8_joint_attention` beside `joint_attention` in the same dtype."""

import cost
import pytest
from conftest import DEVICE, NARROW, TOKENS_ON_CPU, skip_unless_live

from cogvx_kernels import int8_joint_attention, joint_attention, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.int8_joint_attention.cases import REAL

pytestmark = pytest.mark.products

BACKENDS = [
    (op, name, backend)
    for name, op in (("joint_attention", joint_attention), ("int8_joint_attention", int8_joint_attention))
    for backend in ("reference", *OPS[name].backends)
]


@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize(("op", "name", "backend"), BACKENDS, ids=lambda x: x if isinstance(x, str) else "")
def test_forward(measure, op, name, backend, case):
    batch, heads, tokens, width = REAL[case].args
    tokens, heads = (tokens, heads) if DEVICE == "cuda" else (min(tokens, TOKENS_ON_CPU), 4)
    args = REAL[case].func(batch, heads, tokens, width, dtype=NARROW, device=DEVICE)
    others = (None, False) if name == "joint_attention" else ()
    skip_unless_live(name, backend, *args, *others)
    y = measure(f"int8 forward {case} {list(args[0].shape)}", backend, lambda: op(*args), cost.of(name, args))
    with use_backend("reference"):
        exact = joint_attention(*(x[:1, :1].float() for x in args))
    distance = (y[:1, :, :width].float() - exact).norm() / exact.norm()
    assert distance <= 2e-2
