"""Arguments of `causal_conv3d` for tests (SMALL), fuzzing (`draw`, ILLEGAL) and benchmarks (REAL)."""

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
    kernel: tuple[int, int, int] = (3, 3, 3),
    bias: bool = True,
    still: bool = False,
    residual: bool = False,
    *,
    dtype=torch.float32,
    device="cpu",
    seed=0,
    scale=1.0,
) -> tuple:
    """`frames` of result, behind a halo of K_t - 1; with `still` that is copies of the first frame."""
    normal = Normal(dtype, device, seed)
    taps = width_in * kernel[0] * kernel[1] * kernel[2]
    x = normal(batch, width_in, kernel[0] - 1 + frames, height, columns, std=scale)
    if still:
        x[:, :, : kernel[0] - 1] = x[:, :, kernel[0] - 1 : kernel[0]]
    return (
        x,
        normal(width, width_in, *kernel, std=taps**-0.5),
        normal(width) if bias else None,
        normal(batch, width, frames, height, columns, std=scale) if residual else None,
    )


SMALL = [
    partial(make, 2, 4, 6, 3, 5, 7),
    partial(make, 1, 3, 5, 1, 4, 4, bias=False, residual=True),
    partial(make, 1, 16, 16, 2, 8, 8, residual=True),
    partial(make, 2, 3, 5, 4, 3, 6, still=True, residual=True),
    partial(make, 1, 1, 1, 1, 1, 1),
    partial(make, 1, 5, 3, 2, 3, 4, kernel=(1, 1, 1)),
    partial(make, 1, 2, 3, 2, 3, 5, kernel=(2, 3, 1)),
    partial(make, 0, 2, 3, 2, 3, 3, residual=True),
    partial(make, 1, 40, 136, 1, 9, 19, kernel=(1, 3, 3), residual=True),  # two and more of every tile, and ragged ends
    partial(make, 2, 72, 24, 1, 3, 17, kernel=(2, 1, 3)),
    partial(make, 1, 2, 3, 1, 9, 20, kernel=(1, 9, 9)),
    partial(make, 1, 40, 3, 1, 2, 3, kernel=(1, 1, 1)),
    partial(make, 1, 3, 40, 1, 4, 5, kernel=(2, 3, 1)),
    partial(make, 1, 3, 5, 1, 35, 17, kernel=(1, 3, 1)),  # pixels for several sums of the weight's gradient
]

REAL = {
    "decoder, 512 at 60 x 90": partial(make, 1, 512, 512, 2, 60, 90),
    "decoder, 256 at 240 x 360": partial(make, 1, 256, 256, 8, 240, 360),
    "decoder, 512 at 60 x 90, second of a block": partial(make, 1, 512, 512, 2, 60, 90, residual=True),
    "decoder, 128 at 480 x 720": partial(make, 1, 128, 128, 8, 480, 720),
    "decoder, 128 at 480 x 720, first chunk": partial(make, 1, 128, 128, 9, 480, 720, still=True),
}

ILLEGAL = [
    ("x", lambda x: x[:, :, :0]),
    ("x", lambda x: x[:, :, :, :0]),
    ("x", lambda x: torch.cat([x, x], dim=1)),
    ("weight", lambda x: torch.cat([x, x], dim=1)),
    ("weight", lambda x: torch.cat([x, x], dim=3)),
    ("weight", lambda x: x[:0]),
    ("bias", lambda x: torch.ones(10**4)),
    ("bias", lambda x: 1.0),
    ("residual", lambda x: torch.ones(10**4)),
    ("residual", lambda x: torch.ones(1, 1, 1, 1, 97)),
    ("residual", lambda x: 1.0),
]


def draw(rng: random.Random) -> partial:
    return partial(
        make,
        rng.choice([0, 1, 1, 2]),
        rng.choice([1, 2, 3, 8, 17, 40]),
        rng.choice([1, 2, 5, 16, 40]),
        rng.choice([1, 2, 3]),
        rng.choice([1, 2, 5, 8]),
        rng.choice([1, 3, 7, 8]),
        rng.choice([(3, 3, 3), (3, 3, 3), (1, 1, 1), (2, 1, 5), (4, 3, 3)]),
        rng.random() < 0.7,
        rng.random() < 0.3,
        rng.random() < 0.5,
    )


def kernels(module: ModuleType, capability: int) -> Iterator[tuple]:
    """Each Triton kernel with the types of its arguments, constants and options, for the published VAE."""
    taps = {"K_T": 3, "K_H": 3, "K_W": 3}
    widths = ((512, 512), (16, 512), (3, 128), (128, 3))
    cases = [(torch.bfloat16, *pair) for pair in widths] + [(torch.float32, 256, 256), (torch.float32, 128, 3)]
    for dtype, num_in, num_out in cases:
        name = "fp32" if dtype == torch.float32 else "bf16"
        sizes = dict.fromkeys(("num_pixels", "frames_in", "frames_out", "height", "width", "tiles_a_split"), "i32")
        sizes |= {n: "i32" if size % 16 else "i32:16" for n, size in (("num_in", num_in), ("num_out", num_out))}
        values = dict.fromkeys(("x", "weight", "bias", "residual", "y", "grad"), f"*{name}:16") | {
            "partials": "*fp32:16"
        }
        for pad_t in (0, 2):
            constants = {"PAD_T": pad_t, "HAS_BIAS": pad_t == 0, "HAS_RESIDUAL": pad_t == 0, **taps}
            yield _compiled(module.forward_kernel, sizes | values, constants,
                            module.forward_options(num_in, num_out, 27, dtype))  # fmt: skip
        yield _compiled(module.weight_kernel, sizes | values, taps, module.weight_options(num_in, num_out, 27, dtype))


def _compiled(kernel, types: dict, constants: dict, options: dict) -> tuple:
    constants = constants | {name: options.pop(name) for name in kernel.arg_names if name in options}
    return kernel, {name: types[name] for name in kernel.arg_names if name in types}, constants, options
