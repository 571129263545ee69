"""Several processes make the video of one; `worlds.py` has them do so."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cogvx.data.video import read_metadata, read_video

HERE = Path(__file__).parent
LIMITS = {"latents": 1e-5, "frames": 1e-5, "careful": 2e-3, "wide": 2e-3}  # the last two in fp16


def run(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HERE / "worlds.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
def test_several_processes_make_the_video_of_one_and_send_what_is_predicted(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    compared = [json.loads((tmp_path / f"{n}-{rank}.json").read_text()) for n in (2, 3, 4) for rank in range(n)]
    for process in compared:
        for name, found in process.items():
            errors = {what: found[what] for what in LIMITS if not found[what] <= LIMITS[what]}
            assert not errors, (name, errors)
            assert found["sent"] == found["predicted"], name
    kinds = {kind for process in compared for found in process.values() for kind in found["sent"]}
    assert kinds == {"heads", "keys", "patches", "sides", "halos", "frames", "rows", "moments"}
    check_the_embedded_checkpoints(tmp_path, done.stdout)


def check_the_embedded_checkpoints(folder: Path, printed: str) -> None:
    alone, together = (folder / f"{name}.mp4" for name in ("alone", "together"))
    frames, others = (read_video(file)[0].astype(int) for file in (alone, together))
    # The frames themselves are compared above; here they lie behind H.264, in which a level grows to several.
    error = np.square(frames - others).mean()
    assert error < 0.5, error  # 51 dB
    assert read_metadata(together)["parallel"] == {"guidance": 1, "heads": 2, "tokens": 1, "frames": 2, "rows": 1}
    assert "parallel" not in read_metadata(alone)
    assert printed.count("alone.mp4") == printed.count("together.mp4") == 1  # one process speaks
    assert {file.suffix for file in folder.iterdir()} == {".json", ".mp4"}


@pytest.mark.parametrize(("how", "said"), [
    pytest.param("kill", "process 1 of 3 has ended", marks=pytest.mark.slow),
    pytest.param("raise", "process 1 of 3 stopped: RuntimeError: no space left", marks=pytest.mark.soak),
    pytest.param("freeze", "process 1 of 3 has ended or hangs", marks=pytest.mark.soak),
])  # fmt: skip
def test_a_process_that_ends_ends_all_others_within_30_seconds(how, said, tmp_path):
    done = run(tmp_path, how)
    ended = json.loads((tmp_path / "ended.json").read_text())
    for rank in (0, 2):
        if how == "freeze":  # they wait for it in a collective, where no exception reaches them
            continue
        when, words = json.loads((tmp_path / f"{rank}.json").read_text())
        assert when - ended < 30 and words.startswith("ParallelError") and said in words, (rank, words)
    assert how != "freeze" or done.stderr.count(said) == 2, done.stderr
    assert not list(tmp_path.glob("*.mp4")) and not list(tmp_path.glob(".cogvx*"))
