"""Arguments of `linear` for tests (SMALL), fuzzing (`draw`, ILLEGAL) and benchmarks (REAL)."""

import random
from functools import partial

import torch

from ..testing import Normal


def make(
    batch: int,
    tokens: int,
    width: int,
    out: int,
    with_bias: bool = True,
    gelu: bool = False,
    *,
    dtype=torch.float32,
    device="cpu",
    seed=0,
    scale=1.0,
) -> tuple:
    normal = Normal(dtype, device, seed)
    return (
        normal(batch, tokens, width, std=scale),
        normal(out, width, std=max(width, 1) ** -0.5),
        normal(out, std=0.5) if with_bias else None,
        gelu,
    )


SMALL = [
    partial(make, 2, 41, 64, 48),
    partial(make, 1, 70, 48, 37, False),
    partial(make, 2, 40, 33, 70, True, True),
    partial(make, 1, 1, 1, 1),
    partial(make, 3, 27, 59, 130),
    partial(make, 1, 300, 1920, 70),
    partial(make, 1, 70, 2049, 33, True, True),
    partial(make, 2, 0, 16, 8),
    partial(make, 0, 4, 16, 8),
]

REAL = {
    "2b, up and GELU": partial(make, 1, 4096, 1920, 7680, True, True),
    "2b, down": partial(make, 1, 4096, 7680, 1920),
    "2b, attention": partial(make, 1, 4096, 1920, 1920),
}

ILLEGAL = [
    ("x", lambda x: torch.cat([x, x], -1)),
    ("weight", lambda weight: torch.cat([weight, weight], 1)),
    ("bias", lambda bias: torch.zeros(999)),
]


def draw(rng: random.Random) -> partial:
    # Nothing of one row or column: of a single value, which order of a sum happens to be the more exact is chance.
    sizes = (rng.choice([0, 7, 64, 101]), rng.choice([8, 59, 64, 190, 500]), rng.choice([8, 40, 111]))
    return partial(make, rng.choice([0, 1, 1, 2, 3]), *sizes, rng.random() < 0.7, rng.random() < 0.4)
