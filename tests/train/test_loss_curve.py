"""Training computes what it computed when the committed curve was written; loss_curve.py writes it anew."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_a_hundred_losses_are_those_committed(one_thread):
    spec = importlib.util.spec_from_file_location("loss_curve", Path(__file__).with_name("loss_curve.py"))
    spec.loader.exec_module(curve := importlib.util.module_from_spec(spec))
    stored, found = json.loads(curve.FILE.read_text()), curve.losses()
    assert len(found) == len(stored["losses"]) == 100 and found[-1] < 0.7 * found[0]
    if curve.machine().items() <= stored.items():
        assert found == stored["losses"]
    assert found == pytest.approx(stored["losses"], rel=1e-3)
