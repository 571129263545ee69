import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from threading import Event

import numpy as np
import pytest
import torch

from cogvx.models.checkpoint import CheckpointError
from cogvx.train import checkpoint
from cogvx.train.checkpoint import Saver, load_state, restore, save_state, steps
from cogvx.train.manifest import verify
from cogvx.train.randomness import RandomStates


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


def test_the_last_and_the_best_states_are_kept(tmp_path):
    for step, score in enumerate([0.5, 0.2, 0.9, 0.3, 0.8, 0.7], 1):
        save_state(tmp_path, step, state(step), keep_last=2, keep_best=2, score=score)
    assert steps(tmp_path) == [2, 4, 5, 6]
    assert load_state(tmp_path, 2)[1]["model"]["weight"][0] == 2
    assert load_state(tmp_path, 3) is None


def test_saving_a_step_again_replaces_it_and_a_kill_between_the_renames_is_mended(tmp_path):
    save_state(tmp_path, 5, state(1.0))
    save_state(tmp_path, 5, state(2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000005"]
    (tmp_path / "step-0000005").rename(tmp_path / "replaced-0000005")
    step, trees = load_state(tmp_path)
    assert step == 5 and trees["model"]["weight"][0] == 2.0


def flip_bits(folder, seed: int, count: int) -> None:
    """Flip one bit of a state in `folder`, check that loading refuses it and names the file, and flip it back."""
    save_state(folder, 3, state(1.5))
    rng, files = random.Random(seed), sorted((folder / "step-0000003").iterdir())
    offsets = [(file, i) for file in files for i in range(file.stat().st_size)]
    for _ in range(count):
        # Any file alike, so that the small ones, manifest and JSON, are hit as often as the weights.
        file = rng.choice(files)
        offset, bit = rng.choice([i for f, i in offsets if f == file]), 1 << rng.randrange(8)
        before = file.read_bytes()
        file.write_bytes(before[:offset] + bytes([before[offset] ^ bit]) + before[offset + 1 :])
        with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
            load_state(folder)
        file.write_bytes(before)
    assert load_state(folder)[0] == 3


def test_every_flipped_bit_is_found(tmp_path):
    flip_bits(tmp_path, seed=0, count=30)


@pytest.mark.soak
def test_every_flipped_bit_of_a_thousand_is_found(tmp_path):
    flip_bits(tmp_path, seed=1, count=1000)


def test_a_missing_and_a_foreign_file_and_another_steps_state_are_found(tmp_path):
    save_state(tmp_path, 1, state(1.0), keep_last=2)
    save_state(tmp_path, 2, state(2.0), keep_last=2)
    newest = tmp_path / "step-0000002"
    (newest / "model.json").rename(tmp_path / "model.json")
    with pytest.raises(CheckpointError, match=f"model.json is missing.*remove {newest} to go on from step 1"):
        load_state(tmp_path)
    (tmp_path / "model.json").rename(newest / "model.json")
    (newest / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"notes\.txt does not belong there"):
        load_state(tmp_path)
    (newest / "notes.txt").unlink()
    newest.rename(tmp_path / "step-0000004")
    with pytest.raises(CheckpointError, match="holds the state of step 2"):
        load_state(tmp_path)
    (tmp_path / "step-0000004" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="has no manifest"):
        load_state(tmp_path)


def test_a_state_of_another_run_is_refused_by_name(tmp_path):
    model = torch.nn.Linear(2, 2)
    save_state(tmp_path, 1, {"model": model.state_dict()})
    with pytest.raises(CheckpointError, match="has no optimiser; it is that of another kind of run"):
        restore(tmp_path, {"model": model, "optimiser": model})
    with pytest.raises(CheckpointError, match="holds model, which this run has not"):
        restore(tmp_path, {})
    with pytest.raises(CheckpointError, match=r"model of step 1 in .* does not fit this run: .*size mismatch"):
        restore(tmp_path, {"model": torch.nn.Linear(3, 2)})


@contextmanager
def files_of_at_most(size: int):
    """What a full disk is to a writer: no file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def nobody():
    """Without the rights of root, for whom no folder is read-only."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_state_is_written_behind_the_training_as_it_was_when_it_was_saved(tmp_path, monkeypatch):
    weight, may_write = torch.ones(3), Event()
    write = checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda *given: may_write.wait(60) and write(*given))
    with Saver() as saver:
        saver.save(tmp_path, 1, {"model": {"weight": weight}})
        weight.add_(1)  # the next step
        assert not steps(tmp_path)
        may_write.set()
        saver.save(tmp_path, 2, {"model": {"weight": weight}}, keep_last=2)
        assert steps(tmp_path)[0] == 1  # one at a time
    for step in (1, 2):
        assert (load_state(tmp_path, step)[1]["model"]["weight"] == step).all()


def test_what_fails_behind_the_training_is_raised_by_the_next_save_or_at_the_end(tmp_path):
    big = {"model": {"weight": torch.ones(5000)}}
    for save_again in (True, False):
        with files_of_at_most(4000), pytest.raises(CheckpointError, match="step 1 cannot be written"), Saver() as saver:
            saver.save(tmp_path, 1, big)
            if save_again:
                saver.save(tmp_path, 2, big)
                pytest.fail("the error of the first state was to be raised")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [50, 4000])  # too small for the JSON, and for the tensors alone
def test_a_full_disk_leaves_the_earlier_state(tmp_path, size):
    save_state(tmp_path, 1, state(1.0))
    big = state(2.0) | {"ema": {"weight": torch.ones(5000)}}
    with files_of_at_most(size), pytest.raises(CheckpointError, match="the state of step 2 cannot be written to"):
        save_state(tmp_path, 2, big)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]
    assert load_state(tmp_path)[1]["model"]["weight"][0] == 1.0


def test_a_read_only_folder_is_a_clear_error_and_keeps_its_state(tmp_path, monkeypatch):
    save_state(tmp_path, 1, state(1.0))
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o555)
    with nobody(), pytest.raises(CheckpointError, match=r"step 2 cannot be written to .*: Permission denied"):
        save_state(tmp_path.relative_to(tmp_path), 2, state(2.0))
    tmp_path.chmod(0o755)
    assert load_state(tmp_path)[0] == 1


def test_what_a_tree_cannot_hold_is_named(tmp_path):
    with pytest.raises(ValueError, match="model/weight is a set; a state holds dicts"):
        save_state(tmp_path, 1, {"model": {"weight": {1}}})
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="score is nan"):
        save_state(tmp_path, 1, state(1.0), score=float("nan"))


def test_files_of_others_are_saved_and_hashed_with_the_state(tmp_path):
    save_state(tmp_path, 1, state(1.0), beside=lambda folder: (folder / "run.toml").write_text("seed = 0\n"))
    assert "run.toml" in verify(tmp_path / "step-0000001").files
    assert load_state(tmp_path)[1].keys() == {"model", "optimiser"}


def test_random_states_come_back(tmp_path):
    states = RandomStates()
    save_state(tmp_path, 1, {"random": states.state_dict()})
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    assert restore(tmp_path, {"random": states}) == 1
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn


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
        for _ in range(2):  # and once more in the place of itself
            save_state(Path(line.strip()), step, {"model": {"weight": torch.full((4000,), float(step))}}, keep_last=2)
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
