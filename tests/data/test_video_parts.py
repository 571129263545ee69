"""Frames that come part by part go into the same file as all of them at once."""

import numpy as np
import pytest

from cogvx.data.video import write_video


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def test_parts_make_the_same_bytes(tmp_path):
    frames = noise(9, 16, 16)
    write_video(tmp_path / "whole.mp4", frames, 8, {"seed": 1})
    write_video(tmp_path / "parts.mp4", (part for part in np.split(frames, [3, 4])), 8, {"seed": 1})
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "parts.mp4").read_bytes()


def test_parts_that_end_in_an_error_leave_no_file(tmp_path):
    def parts():
        yield noise(2, 16, 16)
        raise ArithmeticError("not finite")

    with pytest.raises(ArithmeticError, match="not finite"):
        write_video(tmp_path / "a.mp4", parts(), 8)
    with pytest.raises(ValueError, match=r"keep their size \(16, 16\), not become \(16, 32\)"):
        write_video(tmp_path / "a.mp4", [noise(2, 16, 16), noise(2, 16, 32)], 8)
    with pytest.raises(ValueError, match="no part of them came"):
        write_video(tmp_path / "a.mp4", [], 8)
    assert not list(tmp_path.iterdir())
