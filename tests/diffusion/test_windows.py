from itertools import pairwise

import pytest
import torch

from cogvx.diffusion.windows import window_starts, window_weights, windowed

GRID = [(n, length, overlap) for n in (1, 5, 13, 14, 25, 26, 40) for length in (1, 5, 13) for overlap in range(length)]


@pytest.mark.parametrize(("num_frames", "length", "overlap"), GRID)
def test_windows_cover_all_frames_and_overlap_enough(num_frames, length, overlap):
    starts = window_starts(num_frames, length, overlap)
    assert starts[0] == 0 and starts[-1] == max(num_frames - length, 0)
    moves = [b - a for a, b in pairwise(starts)]
    assert all(0 < move <= length - overlap for move in moves)
    assert not moves or max(moves) - min(moves) <= 1


@pytest.mark.parametrize(("num_frames", "length", "overlap"), GRID)
def test_weights_sum_to_one_in_every_frame(num_frames, length, overlap):
    weights = window_weights(num_frames, length, overlap)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(0), torch.ones(num_frames, dtype=torch.float64), rtol=0, atol=1e-12)


def test_weights_by_hand():
    third = 1 / 3
    expected = [[1, 1, 2 / 3, third, 0, 0], [0, 0, third, 2 / 3, 1, 1]]
    assert window_starts(6, 4, 2) == [0, 2]
    torch.testing.assert_close(window_weights(6, 4, 2), torch.tensor(expected, dtype=torch.float64))


def test_weights_move_gradually_from_window_to_window():
    weights = window_weights(37, 13, 6)
    assert weights.diff(dim=1).abs().max() < 0.2


@pytest.mark.parametrize(("length", "overlap"), [(13, 6), (13, 0), (5, 4), (40, 3)])
@pytest.mark.parametrize("dim", [1, 2, -3])
def test_no_seam_for_a_denoiser_that_looks_at_each_frame_alone(length, overlap, dim):
    def local(latents, timestep, step_index):
        return torch.tanh(latents) * timestep + step_index

    latents = torch.randn(2, 30, 31, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = windowed(local, length, overlap, dim)(latents, 999, 4)
    torch.testing.assert_close(whole, local(latents, 999, 4), rtol=1e-6, atol=1e-4)


def test_windows_that_differ_are_blended():
    calls = []

    def numbered(latents, timestep, step_index):
        calls.append(latents.shape[2])
        return torch.full_like(latents, float(len(calls)))

    blended = windowed(numbered, 4, 2)(torch.zeros(1, 1, 6, 1, 1), 0, 0).flatten()
    assert calls == [4, 4]
    torch.testing.assert_close(blended, torch.tensor([1, 1, 4 / 3, 5 / 3, 2, 2]))


def test_a_clip_that_fits_passes_through():
    latents = torch.randn(1, 2, 13, 2, 2).bfloat16()
    seen = []
    windowed(lambda x, t, i: seen.append(x) or x, 13, 6)(latents, 0, 0)
    assert seen[0] is latents and len(seen) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ((13, 4, 4), "overlap must be below length, 4, not 4"),
        ((13, 0, 0), "length must be a whole number from 1, not 0"),
        ((13, 4, -1), "overlap must be a whole number from 0, not -1"),
        ((13.0, 4, 1), "num_frames must be a whole number from 1, not 13.0"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        window_starts(*call)
