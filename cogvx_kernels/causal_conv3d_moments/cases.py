"""Arguments of `causal_conv3d_moments`: some of `causal_conv3d`, and frames of many tiles."""

import random
from functools import partial

from ..causal_conv3d import cases

make = cases.make
SMALL = [
    *cases.SMALL[:5],
    partial(make, 0, 2, 3, 2, 3, 3, residual=True),
    partial(make, 1, 2, 3, 1, 9, 20, kernel=(1, 9, 9)),
    partial(make, 1, 40, 136, 1, 9, 19, kernel=(1, 3, 3), residual=True),  # two tiles of channels
    partial(make, 2, 8, 40, 2, 17, 35, residual=True),  # several tiles, ragged
    partial(make, 1, 8, 3, 1, 130, 66, kernel=(1, 1, 1)),  # more tiles than are put together at once
]
REAL = {  # few frames, because the whole result is checked in float64
    "decoder, 512 at 60 x 90, second of a block": partial(make, 1, 512, 512, 2, 60, 90, residual=True),
    "decoder, 128 at 480 x 720, one frame": partial(make, 1, 128, 128, 1, 480, 720),
}
ILLEGAL = cases.ILLEGAL


def draw(rng: random.Random) -> partial:
    return cases.draw(rng)
