"""How much memory the tensors of a call take, and which device is whose."""

import pytest
import torch

from cogvx.machine import own_device, peak_of_tensors
from cogvx.settings import SettingsError

CPU, MEGABYTE = torch.device("cpu"), 2**20


def test_the_peak_counts_what_is_held_at_once():
    def one_after_another():
        for _ in range(5):
            torch.ones(MEGABYTE // 4)

    def together():
        return [torch.ones(MEGABYTE // 4) for _ in range(5)]

    assert MEGABYTE <= peak_of_tensors(one_after_another, CPU) <= 1.1 * MEGABYTE
    assert 5 * MEGABYTE <= peak_of_tensors(together, CPU) <= 5.1 * MEGABYTE


def test_the_peak_counts_what_an_operator_holds_inside_and_not_what_was_there():
    x = torch.rand(MEGABYTE // 4)
    assert MEGABYTE <= peak_of_tensors(x.median, CPU) <= 1.1 * MEGABYTE  # it sorts a copy
    assert peak_of_tensors(x.sum, CPU) <= 0.1 * MEGABYTE


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU that is not there shows what was tried first")
def test_a_process_tries_its_own_gpu_first(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for asked, tried in ((None, "cuda:3"), ("cuda", "cuda:3"), ("cuda:1", "cuda:1")):
        with pytest.raises(SettingsError, match=f"device is '{tried}', which is not to be had"):
            own_device(asked)
    assert own_device("cpu") == torch.device("cpu")
