"""Arguments of `downsample_conv` for tests (SMALL), fuzzing (`draw`, ILLEGAL) and benchmarks (REAL)."""

import random
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch

from ..testing import Normal


def make(
    batch: int,
    width_in: int,
    width: int,
    frames: int,
    height: int,
    columns: int,
    *,
    dtype=torch.float32,
    device="cpu",
    seed=0,
    scale=1.0,
) -> tuple:
    normal = Normal(dtype, device, seed)
    return (
        normal(batch, width_in, frames, height, columns, std=scale),
        normal(width, width_in, 3, 3, std=(9 * width_in) ** -0.5),
        normal(width),
    )


SMALL = [
    partial(make, 2, 4, 6, 3, 6, 8),
    partial(make, 1, 3, 5, 2, 5, 7),
    partial(make, 1, 16, 16, 1, 4, 3),
    partial(make, 2, 5, 3, 1, 3, 6),
    partial(make, 1, 1, 1, 1, 2, 2),
    partial(make, 1, 2, 3, 1, 2, 5),
    partial(make, 0, 2, 3, 2, 4, 4),
    partial(make, 1, 40, 136, 2, 5, 36),  # two and more of every tile, and ragged ends
    partial(make, 1, 136, 24, 1, 19, 6),
    partial(make, 1, 24, 40, 1, 5, 6),
    partial(make, 1, 3, 5, 1, 70, 35),  # pixels for several sums of the weight's gradient
]

REAL = {
    "encoder, 128 at 5 x 480 x 720": partial(make, 1, 128, 128, 5, 480, 720),
    "encoder, 256 at 2 x 240 x 360": partial(make, 1, 256, 256, 2, 240, 360),
    "encoder, 256 at 2 x 120 x 180": partial(make, 1, 256, 256, 2, 120, 180),
}

ILLEGAL = [
    ("x", lambda x: x[:, :, :0]),
    ("x", lambda x: x[:, :, :, :1]),
    ("x", lambda x: x[..., :1]),
    ("weight", lambda x: torch.cat([x, x], dim=1)),
    ("weight", lambda x: x[..., :2]),
    ("weight", lambda x: x[:0]),
    ("bias", lambda x: torch.cat([x, x])),
    ("bias", lambda _: None),
]


def draw(rng: random.Random) -> partial:
    return partial(
        make,
        rng.choice([0, 1, 1, 2]),
        rng.choice([1, 2, 3, 8, 17, 40]),
        rng.choice([1, 2, 5, 16, 40]),
        rng.choice([1, 2, 3]),
        rng.choice([2, 3, 5, 8, 12]),
        rng.choice([2, 3, 7, 10]),
    )


def kernels(module: ModuleType, capability: int) -> Iterator[tuple]:
    """Each Triton kernel with the types of its arguments, constants and options, for the published VAE."""
    gathered, taps = module.gathered, {"K": 3, "PAD": 0}
    for dtype, c in ((torch.bfloat16, 256), (torch.float32, 128)):
        name = "fp32" if dtype == torch.float32 else "bf16"
        sizes = ("num_pixels", "height", "width", "height_in", "width_in", "height_right", "width_right")
        types = dict.fromkeys((*sizes, "height_x", "width_x", "tiles_a_split"), "i32")
        types |= dict.fromkeys(("num_in", "num_out", "num_left", "num_right"), "i32:16") | {"partials": "*fp32:16"}
        types |= dict.fromkeys(("x", "weight", "bias", "y", "left", "right", "grad", "grad_x"), f"*{name}:16")
        for kernel, constants, options in (
            (gathered.gathered_kernel, taps | {"HAS_BIAS": True}, module.pixel_options(c, c, 9, dtype)),
            (module.input_kernel, {}, module.input_options(c, c, dtype)),
            (gathered.weight_kernel, taps, gathered.weight_options(c, c, 9, dtype)),
        ):
            constants = constants | {name: options.pop(name) for name in kernel.arg_names if name in options}
            yield kernel, {name: types[name] for name in kernel.arg_names if name in types}, constants, options
