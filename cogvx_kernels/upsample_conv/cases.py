"""Arguments of `upsample_conv` for tests (SMALL), fuzzing (`draw`, ILLEGAL) and benchmarks (REAL)."""

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
    double_time: bool = False,
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
        double_time,
    )


SMALL = [
    partial(make, 2, 4, 6, 3, 3, 5, double_time=True),
    partial(make, 1, 3, 5, 2, 4, 4, double_time=True),
    partial(make, 1, 16, 16, 1, 4, 3, double_time=True),
    partial(make, 2, 5, 3, 3, 1, 7),
    partial(make, 1, 1, 1, 1, 1, 1),
    partial(make, 0, 2, 3, 2, 3, 3),
    partial(make, 1, 40, 136, 2, 3, 17, double_time=True),  # two and more of every tile, and ragged ends
    partial(make, 1, 136, 24, 1, 9, 3),
    partial(make, 1, 3, 5, 1, 35, 17),  # pixels for several sums of the weight's gradient
]

REAL = {
    "decoder, 512 at 2 x 60 x 90": partial(make, 1, 512, 512, 2, 60, 90, double_time=True),
    "decoder, 256 at 4 x 120 x 180": partial(make, 1, 256, 256, 4, 120, 180, double_time=True),
    "decoder, 256 at 8 x 240 x 360": partial(make, 1, 256, 256, 8, 240, 360),
}

ILLEGAL = [
    ("x", lambda x: x[:, :, :0]),
    ("x", lambda x: x[:, :, :, :0]),
    ("weight", lambda x: torch.cat([x, x], dim=1)),
    ("weight", lambda x: x[..., :2]),
    ("weight", lambda x: x[:0]),
    ("bias", lambda x: torch.cat([x, x])),
    ("bias", lambda _: None),
    ("double_time", lambda _: "yes"),
]


def draw(rng: random.Random) -> partial:
    return partial(
        make,
        rng.choice([0, 1, 1, 2]),
        rng.choice([1, 2, 3, 8, 17, 40]),
        rng.choice([1, 2, 5, 16, 40]),
        rng.choice([1, 2, 3, 5]),
        rng.choice([1, 2, 5, 8]),
        rng.choice([1, 3, 7, 8]),
        rng.random() < 0.5,
    )


def kernels(module: ModuleType, capability: int) -> Iterator[tuple]:
    """Each Triton kernel with the types of its arguments, constants and options, for the published VAE."""
    for dtype, c in ((torch.bfloat16, 512), (torch.float32, 256)):
        name = "fp32" if dtype == torch.float32 else "bf16"
        types = dict.fromkeys(("num_pixels", "num_frames", "height", "width", "tiles_a_split"), "i32")
        types |= dict.fromkeys(("height_in", "width_in", "height_right", "width_right"), "i32")
        types |= dict.fromkeys(("num_in", "num_out", "num_left", "num_right"), "i32:16") | {"partials": "*fp32:16"}
        types |= dict.fromkeys(("x", "weight", "bias", "y", "left", "right"), f"*{name}:16")
        gathered, taps = module.gathered, {"K": 4, "PAD": 1}
        for kernel, constants, options in (
            (module.forward_kernel, {"DOUBLE": True}, module.pixel_options(c, c, 4, dtype)),
            (module.forward_kernel, {"DOUBLE": False}, module.pixel_options(c, c, 4, dtype)),
            (gathered.gathered_kernel, taps | {"HAS_BIAS": False}, module.pixel_options(c, c, 16, dtype)),
            (gathered.weight_kernel, taps, gathered.weight_options(c, c, 16, dtype)),
        ):
            constants = constants | {name: options.pop(name) for name in kernel.arg_names if name in options}
            yield kernel, {name: types[name] for name in kernel.arg_names if name in types}, constants, options
