"""Arguments of `spatial_norm_silu` for tests (SMALL), fuzzing (`draw`, ILLEGAL) and benchmarks (REAL)."""

import random
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch

from ..causal_conv3d_moments.reference import moments as moments_of
from ..group_norm_silu.cases import compiled
from ..testing import Normal


def make(
    batch: int,
    width: int,
    size: tuple[int, int, int],
    latent_width: int,
    latent_size: tuple[int, int, int],
    num_groups: int,
    num_halo: int = 2,
    halo: bool = False,
    moments: bool = False,
    *,
    dtype=torch.float32,
    device="cpu",
    seed=0,
    scale=1.0,
) -> tuple:
    normal = Normal(dtype, device, seed)
    x = normal(batch, width, *size, std=scale, mean=scale / 2)
    return (
        x,
        normal(batch, latent_width, *latent_size),
        normal(width, mean=1.0, std=0.5),
        normal(width, std=0.5),
        normal(width, latent_width, std=latent_width**-0.5),
        normal(width, mean=1.0, std=0.5),
        normal(width, latent_width, std=latent_width**-0.5),
        normal(width, std=0.5),
        normal(batch, width, num_halo, *size[1:]) if halo else None,
        num_groups,
        1e-6,
        num_halo,
        moments_of(x) if moments else None,
    )


SMALL = [
    partial(make, 2, 8, (3, 4, 6), 3, (2, 2, 3), 4, halo=True),
    partial(make, 1, 8, (1, 4, 4), 16, (1, 2, 2), 2, moments=True),
    partial(make, 1, 6, (4, 5, 7), 2, (2, 2, 3), 6, num_halo=0),
    partial(make, 1, 64, (2, 4, 4), 16, (2, 4, 4), 32, halo=True, moments=True),
    partial(make, 1, 3, (5, 1, 1), 1, (3, 1, 1), 1, num_halo=1),
    partial(make, 1, 34, (3, 7, 11), 5, (3, 7, 11), 17),
    partial(make, 1, 32, (2, 3, 13), 6, (2, 3, 13), 4),
    partial(make, 1, 136, (1, 1, 9), 18, (1, 1, 70), 4, num_halo=1),
    partial(make, 1, 520, (2, 2, 5), 3, (2, 1, 5), 4, halo=True),
    partial(make, 1, 2056, (1, 1, 2), 1, (1, 1, 1), 2, num_halo=1),
    partial(make, 1, 3, (1, 105, 105), 2, (1, 15, 21), 1, num_halo=1),  # large enough for sums in float32
    partial(make, 0, 4, (2, 3, 3), 2, (1, 3, 3), 2),
]

REAL = {
    "decoder, 512 at 2 x 60 x 90": partial(make, 1, 512, (2, 60, 90), 16, (2, 60, 90), 32, halo=True),
    "decoder, 256 at 8 x 240 x 360": partial(make, 1, 256, (8, 240, 360), 16, (2, 60, 90), 32, halo=True),
    "decoder, 128 at 8 x 480 x 720": partial(make, 1, 128, (8, 480, 720), 16, (2, 60, 90), 32, halo=True),
}

# For a CPU, which takes seconds for what a GPU does in a millisecond: a part of each frame.
PARTS = {
    "decoder, 512 at 2 x 60 x 90": partial(make, 1, 512, (2, 60, 90), 16, (2, 60, 90), 32, halo=True),
    "decoder, 256 at 8 x 240 x 360": partial(make, 1, 256, (8, 80, 120), 16, (2, 20, 30), 32, halo=True),
    "decoder, 128 at 8 x 480 x 720": partial(make, 1, 128, (8, 120, 176), 16, (2, 15, 22), 32, halo=True),
}

ILLEGAL = [
    ("x", lambda x: x[:, :, :0]),
    ("z", lambda x: x[:, :, :0]),
    ("z", lambda x: torch.cat([x, x], dim=1)),
    ("z", lambda x: torch.cat([x, x[:1], x[:1]])),
    ("weight", lambda x: torch.cat([x, x])),
    ("bias", lambda x: torch.cat([x, x])),
    ("weight_y", lambda x: x.repeat(1, 2)),
    ("bias_y", lambda x: torch.cat([x, x])),
    ("weight_b", lambda x: x.repeat(2, 1)),
    ("bias_b", lambda x: torch.cat([x, x])),
    ("halo", lambda x: torch.ones(9, 9, 9, 9, 9)),
    ("num_groups", lambda _: -2),
    ("eps", lambda _: 0.0),
    ("num_halo", lambda _: -1),
    ("moments", lambda _: torch.ones(3)),
]


def draw(rng: random.Random) -> partial:
    num_groups, num_halo = rng.choice([1, 2, 3, 8]), rng.choice([0, 1, 2, 2])
    frames, height, columns = rng.choice([1, 2, 3, 5]), rng.choice([1, 2, 7, 8]), rng.choice([1, 3, 8, 11])
    latent = (rng.randint(2, 3), rng.randint(1, height), rng.randint(1, columns))
    return partial(
        make,
        rng.choice([0, 1, 1, 2]),
        num_groups * rng.choice([2, 3, 4]),
        (frames, height, columns),
        rng.choice([1, 3, 16]),
        latent,
        num_groups,
        num_halo,
        rng.random() < 0.5,
        rng.random() < 0.3,
    )


def kernels(module: ModuleType, capability: int) -> Iterator[tuple]:
    """Each Triton kernel with the types of its arguments, constants and options, for the published VAE."""
    for dtype in (torch.bfloat16, torch.float32):
        like = torch.empty(1, 128, 1, 2, 2, dtype=dtype, device="meta").to(memory_format=torch.channels_last_3d)
        options = module.tile(like, torch.empty(1, 16, 1, 1, 1, device="meta"))
        for kernel in (module.apply_kernel, module.gradient_kernel):
            yield compiled(kernel, dtype, options)
        yield compiled(module.sums_kernel, dtype, module.tile_of_sums(options, torch.float32))
