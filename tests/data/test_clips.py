import numpy as np
import pytest

from cogvx.data.clips import DataError, accepted, find_clips
from cogvx.data.video import write_video


def put(folder, name: str, size=(9, 32, 48), caption: str | None = "a red circle") -> None:
    frames = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    (folder / name).parent.mkdir(exist_ok=True)
    write_video(folder / name, frames, 8)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)


def test_clips_and_faults_are_found_before_anything_is_computed(tmp_path):
    put(tmp_path, "a.mp4", (20, 32, 48), "  a red circle\n")
    put(tmp_path, "sub/b.mp4")
    put(tmp_path, "c.mp4", caption=None)
    put(tmp_path, "d.mp4", caption=" \n")
    put(tmp_path, "e.mp4", (9, 32, 40))
    put(tmp_path, "f.mp4", (9, 32, 48))
    (tmp_path / "f.mp4").write_bytes((tmp_path / "f.mp4").read_bytes()[:-500])
    put(tmp_path, "g.mp4", caption=None)
    report = find_clips(tmp_path, (16, 16))
    assert [(c.file.name, c.caption, c.num_frames, c.height, c.width) for c in report.clips] == [
        ("a.mp4", "a red circle", 17, 32, 48), ("b.mp4", "a red circle", 9, 32, 48),
    ]  # fmt: skip
    assert report.clips[0].read().shape == (17, 32, 48, 3)
    assert report.faults == {
        "have no caption in a .txt file beside them": ["c.mp4", "g.mp4"],
        "have an empty caption": ["d.mp4"],
        "have a size that is no multiple of 16 x 16 pixels": ["e.mp4"],
        "are damaged, cut short, or no video": ["f.mp4"],
    }
    warnings: list[str] = []
    assert accepted(report, "skip", warnings.append) == report.clips
    message = "2 clips can be trained on; 2 have no caption in a .txt file beside them: c.mp4, g.mp4"
    assert warnings == [str(report)] and str(report).startswith(message)
    with pytest.raises(DataError, match=r"1 have an empty caption: d\.mp4.*on_fault=skip leaves"):
        accepted(report, "stop", warnings.append)


def test_a_number_of_frames_can_be_asked_for(tmp_path):
    put(tmp_path, "long.mp4", (20, 32, 48))
    put(tmp_path, "short.mp4", (10, 32, 48))
    report = find_clips(tmp_path, (16, 16), 17)
    assert [c.num_frames for c in report.clips] == [17]
    assert report.faults == {"have fewer than 17 frames": ["short.mp4"]}


def test_a_folder_without_clips_is_named(tmp_path):
    with pytest.raises(DataError, match="which is no folder"):
        find_clips(tmp_path / "none", (16, 16))
    with pytest.raises(DataError, match="which holds no video"):
        find_clips(tmp_path, (16, 16))
    put(tmp_path, "a.mp4", caption=None)
    with pytest.raises(DataError, match="0 clips can be trained on"):
        accepted(find_clips(tmp_path, (16, 16)), "skip", print)
