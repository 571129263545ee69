import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from cogvx.train.checkpoint import load_state, save_state


def state(value: float) -> dict:
    optimiser = {
        "state": {0: {"step": torch.tensor(3.0), "moment": torch.full((4, 2), value)}},
        "groups": [{"lr": 0.1}],
    }
    return {"model": {"weight": torch.full((3,), value, dtype=torch.bfloat16)}, "optimiser": optimiser}


def test_a_state_comes_back_as_it_was(tmp_path):
    save_state(tmp_path, 7, state(1.5))
    step, trees = load_state(tmp_path)
    assert step == 7
    assert torch.equal(trees["model"]["weight"], state(1.5)["model"]["weight"])
    assert torch.equal(trees["optimiser"]["state"][0]["moment"], torch.full((4, 2), 1.5))
    assert trees["optimiser"]["groups"] == [{"lr": 0.1}]


def test_no_state_is_none(tmp_path):
    assert load_state(tmp_path / "nothing") is None


def test_the_newest_whole_state_wins_and_partial_ones_go(tmp_path):
    save_state(tmp_path, 9, state(1.0))
    save_state(tmp_path, 10, state(2.0))
    (tmp_path / "partial-0000011").mkdir()
    (tmp_path / "partial-0000011" / "model.json").write_text("{")
    assert load_state(tmp_path)[0] == 10
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000010"]


SAVING_FOR_EVER = """
import os, sys, torch
from pathlib import Path
from cogvx.train.checkpoint import save_state
for line in sys.stdin:  # a child a folder: importing torch once for all of them
    if child := os.fork():
        os.waitpid(child, 0)
        os.write(1, b"killed\\n")
        continue
    os.write(1, b"%d\\n" % os.getpid())
    for step in range(1, 10**6):
        save_state(Path(line.strip()), step, {"model": {"weight": torch.full((4000,), float(step))}})
        os.write(1, b"%d\\n" % step)
"""


def kill_while_saving(folders, delays) -> None:
    """For each folder, start a process that saves without end, kill it a delay in seconds after its first save, and
    load what is left."""
    command = [sys.executable, "-c", SAVING_FOR_EVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as saving:
        for folder, delay in zip(folders, delays, strict=True):
            saving.stdin.write(f"{folder}\n")
            child, first = int(saving.stdout.readline()), int(saving.stdout.readline())
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            *_, last = [first, *(int(line) for line in iter(saving.stdout.readline, "killed\n"))]
            step, trees = load_state(folder)
            assert step >= last
            assert (trees["model"]["weight"] == step).all()


@pytest.mark.slow
def test_a_killed_save_leaves_the_last_good_state(tmp_path):
    kill_while_saving([tmp_path / str(i) for i in range(5)], [0.01 + 0.007 * i for i in range(5)])


@pytest.mark.soak
def test_a_killed_save_leaves_the_last_good_state_every_time(tmp_path):
    kill_while_saving([tmp_path / str(i) for i in range(1000)], [0.03 * (i % 97) / 97 for i in range(1000)])
