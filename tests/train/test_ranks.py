"""A run on several processes: what each does, and that their number changes nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from cogvx.train.ranks import ALONE, Ranks, joined


@pytest.mark.parametrize(
    ("words", "runs"),
    [pytest.param([], 3, marks=pytest.mark.slow), pytest.param(["copies"], 1, marks=pytest.mark.soak)],
)
def test_a_run_goes_on_with_more_or_fewer_processes_that_share_the_weights_out_or_not(words, runs):
    program = Path(__file__).with_name("other_ranks.py")
    done = subprocess.run([sys.executable, program, *words], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("losses differ by") == runs


def test_alone_everything_is_ones_own():
    with joined("cpu") as ranks:
        assert ranks is ALONE and ranks.share([3, 4, 5]) == [3, 4, 5] and ranks.added(1.5, None) == 1.5


def test_who_shares_weights_out_computes_as_often_as_all_others():
    """What a process does beside its own counts for nothing; each counts once."""
    items, ranks = ["a", "b", "c", "d", "e"], [Ranks() for _ in range(3)]
    for rank, each in enumerate(ranks):
        each.rank, each.size = rank, 3
    shares = [each.share_evenly(items) for each in ranks]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert sorted(item for share in shares for item, counts in share if counts) == items
    assert [counts for share in shares for _, counts in share].count(0.0) == 1
    ranks[2].size = 8  # more processes than items
    assert [Ranks.share_evenly(ranks[2], items[:2])] == [[("a", 0.0)]]
