"""The VAE in tiles: every legal setting gives the exact shape, `exact` gives the untiled result too."""

import random
from itertools import pairwise

import pytest
import torch

from cogvx.config import VAEConfig
from cogvx.models import CausalVAE
from cogvx.models.tiling import Tiling, TilingError, blending, overlapping, partition

SMALL = VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    model = CausalVAE(SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases that do something
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.inference_mode()
def check(vae: CausalVAE, draw: random.Random) -> None:
    kind, size = draw.choice(["blend", "exact"]), (draw.randint(1, 4), draw.randint(1, 5))
    tile = 8 * draw.randint(1, 5), 8 * draw.randint(2, 6)
    tiling = Tiling(kind, *tile, 0 if kind == "exact" else 8 * draw.randint(0, min(tile) // 8 - 1))
    generator = torch.Generator().manual_seed(draw.randint(0, 2**31))
    count = 1 if draw.random() < 0.7 else 5
    z = torch.randn(1, 4, count, *size, generator=generator)
    video = torch.randn(1, 3, 4 * count - 3, *(8 * n for n in size), generator=generator)
    for half, given in (("decode", lambda: vae.decode(z)), ("encode", lambda: vae.encode(video).mean)):
        vae.tiling = None
        wanted = given()
        vae.tiling = tiling
        found = given()
        assert found.shape == wanted.shape and found.isfinite().all(), (half, tiling, size)
        if kind == "exact" or (8 * size[0] <= tile[0] and 8 * size[1] <= tile[1]):
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), (half, tiling, size)
    vae.tiling = None


def test_fifty_settings(vae):
    draw = random.Random(0)
    for _ in range(50):
        check(vae, draw)


@pytest.mark.soak
def test_a_thousand_settings(vae):
    draw = random.Random(1)
    for _ in range(1000):
        check(vae, draw)


@torch.inference_mode()
def test_tiles_differ_from_the_whole_where_they_should(vae):
    """So that the equality of `exact` is no accident of a picture that is the same everywhere."""
    z = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    whole = vae.decode(z)
    vae.tiling = Tiling("blend", 24, 24, 8)
    assert (vae.decode(z) - whole).abs().max() > 1e-2 * whole.abs().max()
    vae.tiling = None


def test_spans_fill_a_frame():
    for size in range(1, 40):
        for tile in range(1, 45):
            spans = partition(size, tile)
            assert spans[0][0] == 0 and spans[-1][1] == size and max(b - a for a, b in spans) <= tile
            assert all(left[1] == right[0] for left, right in pairwise(spans))
            for overlap in range(tile):
                spans = overlapping(size, tile, overlap)
                assert spans[0][0] == 0 and spans[-1][1] == size and all(b - a == min(tile, size) for a, b in spans)
                assert all(a[1] - b[0] >= overlap for a, b in pairwise(spans))


def test_weights_of_tiles_are_linear_and_add_up_to_one():
    left, right = blending([(0, 3), (2, 5)], 4, torch.device("cpu"))
    assert left.tolist() == [1.0] * 8 + [0.875, 0.625, 0.375, 0.125]
    assert right.tolist() == [0.125, 0.375, 0.625, 0.875] + [1.0] * 8
    total, spans = torch.zeros(7), overlapping(7, 4, 3)
    for (start, stop), weight in zip(spans, blending(spans, 1, torch.device("cpu")), strict=True):
        total[start:stop] += weight
    torch.testing.assert_close(total, torch.ones(7))


@pytest.mark.parametrize(("settings", "message"), [
    (("feathered", 64, 64), "kind of a tiling is 'feathered'; valid: 'blend', 'exact'"),
    (("blend", 60, 64), "height of a tiling is 60; it must be a multiple of 8 pixels, at least 8"),
    (("exact", 64, 0), "width of a tiling is 0"),
    (("exact", 64, True), "width of a tiling is True"),
    (("blend", 64, 64, 64), "overlap of a tiling is 64; it must be less than the tile of 64 x 64"),
    (("blend", 64, 64, -8), "overlap of a tiling is -8"),
    (("exact", 64, 64, 8), "overlap of a tiling is 8; exact tiles need none"),
])  # fmt: skip
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(TilingError, match=message):
        Tiling(*settings)
