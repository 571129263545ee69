"""A run on several processes: what each does, and that their number changes nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from cogvx.train.ranks import ALONE, joined


@pytest.mark.slow
def test_a_run_goes_on_with_more_or_fewer_processes():
    program = Path(__file__).with_name("other_ranks.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("losses differ by") == 2


def test_alone_everything_is_ones_own():
    with joined("cpu") as ranks:
        assert ranks is ALONE and ranks.share([3, 4, 5]) == [3, 4, 5] and ranks.added(1.5, None) == 1.5
