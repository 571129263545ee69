import subprocess
import sys
from pathlib import Path

import pytest

from cogvx.parallel.time_split import WHOLE, latents_of_each

HERE = Path(__file__).parent


def test_the_first_process_has_an_odd_number_of_latents_and_the_others_an_even_one():
    assert latents_of_each(161, 2) == [21, 20]
    assert latents_of_each(161, 4) == [11, 10, 10, 10]
    assert latents_of_each(49, 4) == [3, 2, 4, 4]
    assert latents_of_each(9, 2) == [1, 2]
    assert latents_of_each(1, 1) == [1]
    for num_frames in range(1, 200, 8):
        for size in range(1, num_frames // 8 + 2):
            lengths = latents_of_each(num_frames, size)
            assert sum(lengths) == num_frames // 4 + 1 and len(lengths) == size
            assert lengths[0] % 2 == 1 and all(n > 0 and n % 2 == 0 for n in lengths[1:])


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match=r"num_frames is 16; it must be 8N\+1"):
        latents_of_each(16, 1)
    with pytest.raises(ValueError, match="9 frames can be split over 2 processes at most, not 3"):
        latents_of_each(9, 3)


def test_one_process_has_the_whole_clip():
    assert (WHOLE.size, WHOLE.share_of_frames, WHOLE.share_of_latents) == (1, 1.0, 1.0)


@pytest.mark.slow
def test_two_processes_give_the_loss_and_the_gradients_of_one():
    command = [sys.executable, str(HERE / "two_ranks.py"), "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
