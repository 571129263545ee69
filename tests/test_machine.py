"""How much memory the tensors of a call take."""

import torch

from cogvx.machine import peak_of_tensors

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
