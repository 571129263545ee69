"""In which ways processes share a video, what each then has, computes and sends."""

import re
from dataclasses import replace

import pytest
import torch

from cogvx.config import PRESETS
from cogvx.parallel.links import ParallelError
from cogvx.parallel.scaling import Work, share_of
from cogvx.parallel.split import Layout, lengths
from cogvx.parallel.ways import Limits, Ways, choose_ways, possible
from cogvx.settings import Configs, Settings

LIMITS = Limits(guidance=2, heads=30, tokens=17776, frames=6, rows=60)


def work(name: str, **settings) -> Work:
    preset = PRESETS[name]
    configs = Configs(preset.transformer, preset.vae, preset.schedule)
    return Work(configs, Settings("any", **settings).resolve(configs), torch.bfloat16, torch.bfloat16)


def test_limits_are_those_of_the_video():
    two = work("2b")
    assert Limits.of(two.configs, two.settings) == LIMITS
    assert Limits.of(two.configs, replace(two.settings, guidance_scale=1.0), tiled=True) == Limits(1, 30, 17776, 1, 1)


@pytest.mark.parametrize(("size", "limits", "ways"), [
    (1, LIMITS, Ways()),
    (2, LIMITS, Ways(guidance=2, frames=2)),
    (3, LIMITS, Ways(heads=3, frames=3)),
    (4, LIMITS, Ways(guidance=2, heads=2, frames=4)),
    (8, LIMITS, Ways(guidance=2, heads=4, frames=6)),
    (8, replace(LIMITS, guidance=1), Ways(heads=8, frames=6)),
    (12, replace(LIMITS, heads=4), Ways(guidance=2, heads=3, tokens=2, frames=6)),
    (31, LIMITS, Ways(tokens=31, frames=6)),
])  # fmt: skip
def test_the_automatic_choice_uses_every_process(size, limits, ways):
    assert choose_ways("auto", size, limits) == ways and ways.size == size


def test_ways_are_read_and_what_they_leave_out_is_one():
    assert choose_ways("heads=2, tokens=3", 6, LIMITS) == Ways(heads=2, tokens=3, frames=6)
    for ways in (Ways(2, 2, 1, 3), Ways(2, 2, 1, 1, 4)):
        assert choose_ways(str(ways), 4, LIMITS) == ways
    assert choose_ways("heads=4,rows=4", 4, LIMITS) == Ways(heads=4, rows=4)
    assert set(possible(4, LIMITS)) == {Ways(1, 1, 4, 4), Ways(1, 2, 2, 4), Ways(1, 4, 1, 4), Ways(2, 1, 2, 4),
                                        Ways(2, 2, 1, 4)}  # fmt: skip


@pytest.mark.parametrize(("asked", "size", "limits", "message"), [
    ("heads=31", 31, LIMITS, "heads of parallel is 31, but the model has 30 heads; valid: 1 to 30"),
    ("guidance=3", 3, LIMITS, "guidance of parallel is 3, but guidance has two sides; valid: 1 to 2"),
    ("guidance=2", 2, replace(LIMITS, guidance=1),
     "guidance of parallel is 2, but the video is made without guidance; valid: 1 to 1"),
    ("heads=2,tokens=4", 8, replace(LIMITS, tokens=7),
     "tokens of parallel is 4, but the video has 7 tokens, and heads are shared by 2; valid: 1 to 3"),
    ("heads=8,frames=7", 8, LIMITS, "frames of parallel is 7, but the frames are decoded in 6 chunks; valid: 1 to 6"),
    ("heads=2,frames=3", 2, LIMITS, "frames of parallel is 3, but there are 2 processes; valid: 1 to 2"),
    ("heads=4,rows=2", 4, LIMITS, "rows of parallel is 2, for 4 processes; valid: 1, or 4, all of them"),
    ("heads=4,rows=4", 4, replace(LIMITS, rows=3), "rows of parallel is 4, but latents have 3 rows; valid: 1 to 3"),
    ("heads=4,rows=4,frames=2", 4, LIMITS, "frames or rows are shared, not both: let one of them be 1"),
    ("heads=2", 4, LIMITS, "guidance 1 x heads 2 x tokens 1 make 2; they must make 4"),
    ("auto", 8, replace(LIMITS, tokens=3, heads=1), "tokens of parallel is 4, but the video has 3 tokens"),
    ("fast", 2, LIMITS, "parallel is 'fast'; it must be auto, or numbers from 1 as in guidance=2,heads=2"),
    ("heads=2,heads=1", 2, LIMITS, "parallel is 'heads=2,heads=1'"),
    ("heads=0", 2, LIMITS, "parallel is 'heads=0'"),
    ("auto", 0, LIMITS, "the number of processes is 0; it must be at least 1"),
])  # fmt: skip
def test_ways_that_do_not_fit_are_named(asked, size, limits, message):
    with pytest.raises(ParallelError, match=re.escape(message)):
        choose_ways(asked, size, limits)


def test_nothing_is_left_over_where_numbers_do_not_divide():
    assert lengths(30, 4) == [8, 8, 7, 7] and lengths(17776, 3) == [5926, 5925, 5925]
    for columns, rows in ((2, 2), (3, 1), (1, 3)):
        layout = Layout(115, 7, columns, rows)
        assert sum(layout.tokens_of_rows) == 115 and sum(layout.vision_of_rows) == 108
        assert sum(n for row in range(rows) for n in layout.tokens_in(row)) == 115
    wordy = Layout(97, 61, 3, 1)  # the first process has text alone
    assert [wordy.vision(i) for i in range(3)] == [slice(0, 0), slice(0, 4), slice(4, 36)]
    assert [wordy.text(i) for i in range(3)] == [slice(0, 33), slice(33, 61), slice(61, 61)]


@pytest.mark.parametrize("ways", [Ways(2, 3, 1, 4), Ways(1, 4, 2, 6), Ways(1, 7, 3, 5), Ways(1, 7, 1, 1, 7)], ids=str)
def test_the_work_of_one_is_what_all_processes_do_together(ways):
    two = work("2b")
    alone, shares = share_of(two, Ways(), 0), [share_of(two, ways, process) for process in range(ways.size)]
    assert not alone.sent and all(share.sent for share in shares)
    for what in ("sampling", "decoding"):
        assert sum(getattr(share, what) for share in shares) == pytest.approx(getattr(alone, what), rel=1e-12)


def test_a_worked_share():
    """Of two processes that trade heads: each sends, in 50 steps, 30 layers and of 2 sides, half of q, k, v and y."""
    share = share_of(work("2b"), Ways(heads=2, frames=1), 0)
    assert share.sent["heads"] == 50 * 30 * 2 * (4 * 8888 * 15 * 64) * 2
    assert share.sent["patches"] == 50 * 2 * (8888 - 226) * 64 * 2
    assert share.sampling == 50 * 30 * 2 * (24 * 8888 * 1920**2 + 4 * 17776 * 17776 * 15 * 64)
    assert share.seconds(flops=1e15, link=1e10) == pytest.approx(
        (share.sampling + share.decoding) / 1e15 + sum(share.sent.values()) / 1e10
    )
