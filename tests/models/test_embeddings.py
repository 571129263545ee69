import math

import torch

from cogvx.models.embeddings import rope_positions, sincos_positions, timestep_embedding

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
