"""How a process learns that another one has ended; those that really do are in `test_videos.py`."""

import pytest
import torch.distributed as dist

from cogvx.parallel.links import ParallelError
from cogvx.parallel.processes import joined
from cogvx.parallel.watch import EVERY, Watch


@pytest.fixture
def pair():
    store = dist.HashStore()
    return Watch(store, 0, 2, patience=10 * EVERY), Watch(store, 1, 2, patience=10 * EVERY)


def waited(watch: Watch, seconds: float) -> None:
    """As if the other process had given no mark for so long."""
    watch.marks = {other: (mark, since - seconds) for other, (mark, since) in watch.marks.items()}


def test_a_process_that_marks_nothing_is_lost(pair):
    pair[0].look()
    waited(pair[0], 9 * EVERY)
    pair[0].look()
    assert pair[0].lost is None
    waited(pair[0], 2 * EVERY)
    pair[0].look()
    assert "process 1 of 2 has ended or hangs: no sign of it for 11 s" in pair[0].lost


def test_a_call_that_failed_names_the_silent_process(pair):
    pair[0].look()
    waited(pair[0], 3 * EVERY)
    assert pair[0].explain(RuntimeError("reset")) == ("process 1 of 2 has ended or cannot be reached; nothing was made")


def test_a_process_says_why_it_stopped(pair):
    pair[1].leave(ValueError("no space"))
    pair[0].look()
    assert pair[0].lost == "process 1 of 2 stopped: ValueError: no space"


def test_a_process_that_is_done_may_go(pair):
    pair[1].leave()
    pair[0].look()
    waited(pair[0], 100 * EVERY)
    pair[0].look()
    assert pair[0].lost is None


def test_without_other_processes_it_says_how_to_start_them(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ParallelError, match="start several processes with torchrun"), joined("cpu"):
        pass
