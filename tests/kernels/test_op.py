"""Which backends there are, what a call says that forces one which cannot run, and a graph around an operator."""

import pytest
import torch

import cogvx_kernels
from cogvx_kernels import explain, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.expert_layernorm.cases import SMALL


def test_explain_answers_for_every_operator():
    answer = explain()
    assert set(answer) == set(OPS)
    assert all(backends["reference"] == "live" for backends in answer.values())
    assert list(explain("qk_norm_rope")) == ["qk_norm_rope"]
    with pytest.raises(ValueError, match="op must be one of"):
        explain("flash")


def test_an_unknown_backend_is_refused():
    with (
        pytest.raises(ValueError, match=r"name must be one of reference, .*native.*, got 'trition'"),
        use_backend("trition"),
    ):
        pass


def test_a_forced_backend_that_cannot_run_says_why():
    args = SMALL[0](dtype=torch.float64)
    for backend in OPS["expert_layernorm"].backends:
        reason = OPS["expert_layernorm"].why_not(backend, *args)
        if reason is None:
            continue
        with use_backend(backend), pytest.raises(RuntimeError) as caught:
            cogvx_kernels.expert_layernorm(*args)
        assert str(caught.value) == f"expert_layernorm: backend {backend!r} cannot run here: {reason}"


@pytest.mark.slow
def test_inductor_compiles_around_an_operator():
    args = SMALL[0]()
    model = torch.compile(lambda *args: cogvx_kernels.expert_layernorm(*args).relu(), fullgraph=True)
    torch.testing.assert_close(model(*args), cogvx_kernels.expert_layernorm(*args).relu())


def test_triton_is_not_tried_on_gpus_before_ampere(monkeypatch):
    device = pytest.importorskip("cogvx_kernels._triton_device", exc_type=ImportError)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, reason in (((7, 5), "cuda:1 has compute capability 7.5; "), ((8, 0), None), ((12, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        found = device._why_not_device.__wrapped__(1)
        assert found is None if reason is None else found.startswith(reason)
