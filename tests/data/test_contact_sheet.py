import numpy as np
import pytest
from PIL import Image

from cogvx.data.video import VideoError, write_contact_sheet


@pytest.mark.parametrize(
    ("shape", "count", "size"),
    [
        ((17, 64, 64), 8, (8 * 132 - 4, 128)),
        ((3, 64, 64), 8, (3 * 132 - 4, 128)),
        ((9, 480, 720), 4, (4 * 164 - 4, 107)),
        ((2, 400, 4), 2, (2 * 6 - 4, 160)),
    ],
)
def test_contact_sheets_have_their_frames_in_a_row(tmp_path, shape, count, size):
    write_contact_sheet(tmp_path / "sheet.png", np.zeros((*shape, 3), np.uint8), count)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert (sheet.format, sheet.size) == ("PNG", size)


def test_a_contact_sheet_runs_from_the_first_frame_to_the_last(tmp_path):
    frames = np.broadcast_to(np.arange(17, dtype=np.uint8)[:, None, None, None] * 10, (17, 64, 64, 3))
    write_contact_sheet(tmp_path / "sheet.png", frames, 5)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert [sheet.getpixel((132 * i + 60, 60))[0] for i in range(5)] == [0, 40, 80, 120, 160]
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_a_contact_sheet_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="count must be at least 1, not 0"):
        write_contact_sheet(tmp_path / "sheet.png", np.zeros((1, 8, 8, 3), np.uint8), 0)
    with pytest.raises(VideoError, match="cannot write"):
        write_contact_sheet(tmp_path / "no" / "sheet.png", np.zeros((1, 8, 8, 3), np.uint8))
    assert not list(tmp_path.iterdir())
