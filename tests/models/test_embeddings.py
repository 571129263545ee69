import math
from dataclasses import replace

import pytest
import torch

from cogvx.config import PRESETS
from cogvx.models.embeddings import (
    Placement,
    default_placement,
    first_rows,
    intrinsic_frequency,
    lowered,
    resampled,
    rope_positions,
    sincos_positions,
    timestep_embedding,
)
from cogvx_kernels import qk_norm_rope

CPU = torch.device("cpu")


def test_timestep_embedding_is_cosines_then_sines():
    got = timestep_embedding(torch.tensor([0, 3]), 4)
    want = [[1.0, 1.0, 0.0, 0.0], [math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)]]
    torch.testing.assert_close(got, torch.tensor(want))


def test_sincos_channels_are_time_then_width_then_height():
    grid, width = (2, 2, 3), 16
    table = sincos_positions(grid, width, 2.0, 1.0, CPU).unflatten(0, grid)
    t, h, w = 1, 1, 2
    want = []
    for position, size in ((t, 4), (w / 2.0, 6), (h / 2.0, 6)):
        angles = [position / 10000 ** (2 * i / size) for i in range(size // 2)]
        want += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    torch.testing.assert_close(table[t, h, w], torch.tensor(want))


def test_rope_at_the_trained_grid_turns_by_whole_coordinates():
    grid = (2, 2, 3)
    cos, sin = (table.unflatten(0, grid) for table in rope_positions(grid, (2, 3), 16, CPU))
    t, h, w = 1, 1, 2
    axes = ((t, 4), (h, 6), (w, 6))
    angles = [position / 10000 ** (2 * i / size) for position, size in axes for i in range(size // 2)]
    twice = torch.tensor([angle for angle in angles for _ in range(2)])
    torch.testing.assert_close(cos[t, h, w], twice.cos())
    torch.testing.assert_close(sin[t, h, w], twice.sin())


def test_rope_scales_and_centres_another_grid():
    # 4 x 4 within 4 x 8: rows 0 ... 4, columns 2 ... 6; the last coordinate is the end times 3 / 4.
    _, sin = rope_positions((1, 4, 4), (4, 8), 16, CPU)
    column = sin.unflatten(0, (4, 4))[0, :, 10]
    torch.testing.assert_close(column, torch.tensor([2.0, 2 + 2.5 / 3, 2 + 5 / 3, 4.5]).sin())
    # 8 x 16 within 4 x 8: half steps.
    _, sin = rope_positions((1, 8, 16), (4, 8), 16, CPU)
    torch.testing.assert_close(sin.unflatten(0, (8, 16))[0, :, 10], (torch.arange(16) / 2).sin())


def test_tables_made_while_sampling_serve_training():
    with torch.inference_mode():
        table = sincos_positions((1, 2, 5), 16, 1.0, 1.0, CPU)
    weight = torch.ones(16, requires_grad=True)
    (table * weight).sum().backward()
    torch.testing.assert_close(weight.grad, table.sum(0))


def scores(positions: tuple[torch.Tensor, torch.Tensor], head_width: int) -> torch.Tensor:
    """What one query and one key, put at each pair of positions, give: [N, N]."""
    cos, sin = positions
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 1, 3 * head_width, generator=generator).expand(1, len(cos), -1)
    one, zero = torch.ones(head_width), torch.zeros(head_width)
    q, k, _ = qk_norm_rope(qkv, one, zero, one, zero, cos, sin, 0, 1, 1e-6)
    q, k = (x.reshape(len(cos), head_width) for x in (q, k))
    return q @ k.T


@pytest.mark.parametrize("placement", [Placement(), Placement("sliced"), Placement(intrinsic=2)], ids=str)
def test_scores_depend_on_relative_position_alone(placement):
    grid = (5, 4, 6)
    table = scores(rope_positions(grid, (2, 3), 32, CPU, placement.rope, placement.intrinsic), 32)
    table = table.unflatten(1, grid).unflatten(0, grid)
    shifted = table[1:, 1:, 1:, 1:, 1:, 1:], table[:-1, :-1, :-1, :-1, :-1, :-1]
    torch.testing.assert_close(*shifted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [(2, 2, 3), (1, 5, 3), (7, 3, 9)], ids=str)
def test_sliced_rope_turns_by_whole_coordinates_in_any_grid(grid):
    cos, sin = (table.unflatten(0, grid) for table in rope_positions(grid, (2, 3), 16, CPU, "sliced"))
    t, h, w = (size - 1 for size in grid)
    axes = ((t, 4), (h, 6), (w, 6))
    angles = [position / 10000 ** (2 * i / size) for position, size in axes for i in range(size // 2)]
    twice = torch.tensor([angle for angle in angles for _ in range(2)])
    torch.testing.assert_close(cos[t, h, w], twice.cos())
    torch.testing.assert_close(sin[t, h, w], twice.sin())


def test_rules_agree_at_the_trained_grid():
    for rescaled, sliced in zip(
        rope_positions((13, 30, 45), (30, 45), 64, CPU), rope_positions((13, 30, 45), (30, 45), 64, CPU, "sliced"),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(rescaled, sliced, rtol=0, atol=5e-6)
    table = torch.randn(2 * 4 * 6, 3)
    assert torch.equal(resampled(table, (2, 4, 6), (2, 4, 6)), table)
    assert torch.equal(first_rows(table, (2, 4, 6)), table)


def test_riflex_lowers_one_frequency_until_its_period_covers_the_clip():
    frequencies = 1e4 ** (-torch.arange(0, 16, 2, dtype=torch.float32) / 16)
    for num_frames in (19, 25, 49, 193):
        changed = lowered(frequencies, 2, num_frames)
        assert changed[1].item() == pytest.approx(0.9 * 2 * math.pi / num_frames)
        assert torch.equal(changed[[0, 2, 3, 4, 5, 6, 7]], frequencies[[0, 2, 3, 4, 5, 6, 7]])
    for num_frames in (1, 13, 17):  # within 0.9 of the period of 19.9
        assert torch.equal(lowered(frequencies, 2, num_frames), frequencies)
    assert torch.equal(frequencies, lowered(frequencies, None, 100))
    with pytest.raises(ValueError, match="intrinsic is 9; time has the frequencies 1 to 8"):
        lowered(frequencies, 9, 100)


def test_riflex_changes_time_alone_and_never_returns_to_the_start():
    grid = (40, 2, 2)
    plain, riflex = (rope_positions(grid, (2, 2), 64, CPU, "rescaled", k) for k in (None, 2))
    for before, after in zip(plain, riflex, strict=True):
        assert torch.equal(before[:, [*range(2), *range(4, 64)]], after[:, [*range(2), *range(4, 64)]])
        assert not torch.equal(before, after)

    def distances(tables) -> torch.Tensor:
        """From the first frame's rotation of the intrinsic frequency to those of every later one."""
        cos, sin = (table.unflatten(0, grid)[:, 0, 0, 2] for table in tables)
        return torch.hypot(cos[1:] - cos[0], sin[1:] - sin[0])

    one_step = distances(riflex)[0]
    assert distances(plain).argmin() == 19 and distances(plain).min() < 0.05  # back at the start after 20 frames
    assert (distances(riflex) >= one_step - 1e-6).all()


def test_the_intrinsic_frequency_is_the_fastest_that_covers_the_trained_clip():
    assert intrinsic_frequency(13, 64) == 2  # CogVideoX-5B: periods 6.3, 19.9, 62.8, ...
    assert intrinsic_frequency(21, 64) == 3
    assert intrinsic_frequency(10**9, 64) == 8


def test_a_learned_table_is_interpolated_along_each_axis():
    trained = (2, 4, 8)
    t, h, w = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in trained), indexing="ij")
    table = torch.stack([t, h, w], dim=-1).flatten(0, 2)  # its rows hold their own coordinates
    portrait = resampled(table, (1, 4, 4), trained).unflatten(0, (1, 4, 4))
    assert portrait[0, :, 0].T.tolist() == [[0.0] * 4, [0.0, 1.0, 2.0, 3.0], [2.0] * 4]
    torch.testing.assert_close(portrait[0, 0, :, 2], torch.tensor([2.0, 2 + 2.5 / 3, 2 + 5 / 3, 4.5]))
    longer = resampled(table, (5, 8, 16), trained).unflatten(0, (5, 8, 16))
    assert longer[:, 0, 0, 0].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    torch.testing.assert_close(longer[0, 0, :, 2], (torch.arange(16) / 2).clamp(max=7))
    half = resampled(table.bfloat16(), (5, 8, 16), trained)
    torch.testing.assert_close(half, longer.flatten(0, 2))


def test_defaults_are_those_of_diffusers():
    wanted = {
        "2b": ("rescaled", "recomputed"), "5b": ("rescaled", "recomputed"), "5b-i2v": ("rescaled", "resampled"),
        "1.5-5b": ("sliced", "recomputed"), "1.5-5b-i2v": ("sliced", "recomputed"),
    }  # fmt: skip
    for name, rules in wanted.items():
        assert default_placement(PRESETS[name].transformer) == Placement(*rules)


def test_wrong_rules_are_named():
    for changes, message in (
        ({"rope": "scaled"}, "rope is 'scaled'; it must be one of rescaled, sliced"),
        ({"table": "learned"}, "table is 'learned'; it must be one of recomputed, sliced, resampled"),
        ({"intrinsic": 0}, "intrinsic is 0; it must be None or the number of a frequency, from 1"),
        ({"intrinsic": True}, "intrinsic is True"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(Placement(), **changes)
    with pytest.raises(ValueError, match="12 patches do not fit the 5 positions"):
        first_rows(torch.zeros(5, 3), (2, 2, 3))
