"""What workers read ahead is what would be read without them, and no worker is left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from cogvx.train.ahead import ahead
from cogvx.train.options import TrainingError


def read(step: int) -> dict:
    if step == 7:
        raise TrainingError("step 7 has no clip")
    return {"step": step, "noise": torch.randn(3, generator=torch.Generator().manual_seed(step))}


def test_the_items_are_those_of_one_process_and_its_random_state_stands_still():
    before = torch.get_rng_state()
    found = []
    for workers in (0, 2):
        with ahead(read, range(2, 7), workers) as items:
            found.append(list(items))
        assert not multiprocessing.active_children()
    assert [item["step"] for item in found[0]] == [2, 3, 4, 5, 6]
    for one, other in zip(*found, strict=True):
        assert one["step"] == other["step"] and torch.equal(one["noise"], other["noise"])
    assert torch.equal(torch.get_rng_state(), before)


def test_no_worker_starts_where_nothing_is_left_to_read():
    with ahead(read, range(5, 5), 2) as items:
        assert not multiprocessing.active_children() and not list(items)


def test_an_error_comes_in_its_turn_and_ends_the_workers():
    with pytest.raises(TrainingError, match=r"^step 7 has no clip$"), ahead(read, range(6, 100), 2) as items:
        assert next(items)["step"] == 6
        next(items)
    assert not multiprocessing.active_children()


def test_a_worker_that_was_killed_is_a_clear_error():
    with (
        pytest.raises(TrainingError, match=r"^DataLoader worker .*; with workers=0 all is"),
        ahead(read, range(99), 1) as items,
    ):
        next(items)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        list(items)
    assert not multiprocessing.active_children()


KILLED = """
import multiprocessing, os, signal
from cogvx.train.ahead import ahead
with ahead(abs, range(10**6), 2) as items:
    [next(items) for _ in range(COUNT)]
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.soak
@pytest.mark.parametrize("count", [0, 1])  # read before: of none, the workers have hardly begun
def test_workers_end_where_their_process_was_killed(count):
    script = KILLED.replace("COUNT", str(count))
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=False, timeout=60)
    workers = [int(word) for word in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and len(workers) == 2
    for _ in range(300):
        if not any(is_running(pid) for pid in workers):
            return
        time.sleep(0.1)
    pytest.fail("workers were still there after 30 seconds")


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"  # nobody asks for the end of an orphan's
    except FileNotFoundError:
        return False
