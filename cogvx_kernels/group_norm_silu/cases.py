"""Arguments of `group_norm_silu` for tests (SMALL), fuzzing (`draw`, ILLEGAL) and benchmarks (REAL)."""

import random
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch

from ..causal_conv3d_moments.reference import moments as moments_of
from ..testing import Normal


def make(
    batch: int,
    width: int,
    frames: int,
    height: int,
    columns: int,
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
    x = normal(batch, width, frames, height, columns, std=scale, mean=scale / 2)
    return (
        x,
        normal(width, mean=1.0, std=0.5),
        normal(width, std=0.5),
        normal(batch, width, num_halo, height, columns) if halo else None,
        num_groups,
        1e-6,
        num_halo,
        moments_of(x) if moments else None,
    )


SMALL = [
    partial(make, 2, 8, 3, 5, 7, 4, halo=True),
    partial(make, 1, 8, 1, 4, 4, 2, moments=True),
    partial(make, 1, 6, 2, 3, 5, 6, num_halo=0),
    partial(make, 1, 64, 2, 4, 4, 32, halo=True, moments=True),
    partial(make, 1, 3, 2, 1, 1, 1, num_halo=1),
    partial(make, 2, 10, 1, 1, 1, 5, num_halo=3, halo=True),
    partial(make, 1, 34, 5, 7, 11, 17),
    partial(make, 1, 256, 1, 9, 9, 32, halo=True),
    partial(make, 1, 1040, 2, 2, 3, 4),
    partial(make, 1, 258, 1, 1, 3, 2, num_halo=1),
    partial(make, 1, 3, 1, 105, 105, 1, num_halo=1),  # large enough for sums in float32
    partial(make, 0, 4, 2, 3, 3, 2),
]

REAL = {
    "encoder, 128 at 8 x 480 x 720": partial(make, 1, 128, 8, 480, 720, 32, halo=True),
    "encoder, 256 at 8 x 240 x 360": partial(make, 1, 256, 8, 240, 360, 32, halo=True),
    "encoder, 512 at 2 x 60 x 90": partial(make, 1, 512, 2, 60, 90, 32, halo=True),
}

# For a CPU, which takes seconds for what a GPU does in a millisecond: a part of each frame.
PARTS = {
    "encoder, 128 at 8 x 480 x 720": partial(make, 1, 128, 8, 120, 180, 32, halo=True),
    "encoder, 256 at 8 x 240 x 360": partial(make, 1, 256, 8, 80, 120, 32, halo=True),
    "encoder, 512 at 2 x 60 x 90": partial(make, 1, 512, 2, 60, 90, 32, halo=True),
}

ILLEGAL = [
    ("x", lambda x: x[:, :, :0]),
    ("x", lambda x: x[:, :0]),
    ("weight", lambda x: torch.cat([x, x])),
    ("bias", lambda x: torch.cat([x, x])),
    ("halo", lambda x: torch.ones(9, 9, 9, 9, 9)),
    ("num_groups", lambda _: 0),
    ("num_groups", lambda x: 1009 * x),
    ("eps", lambda _: float("nan")),
    ("num_halo", lambda _: -1),
    ("moments", lambda _: torch.ones(3)),
]


def draw(rng: random.Random) -> partial:
    num_groups, num_halo = rng.choice([1, 2, 3, 8]), rng.choice([0, 1, 2, 2])
    return partial(
        make,
        rng.choice([0, 1, 1, 2]),
        num_groups * rng.choice([2, 3, 4]),
        rng.choice([1, 2, 3, 5]),
        rng.choice([1, 2, 7, 8]),
        rng.choice([1, 3, 8, 11]),
        num_groups,
        num_halo,
        rng.random() < 0.5,
        rng.random() < 0.3,
    )


def kernels(module: ModuleType, capability: int) -> Iterator[tuple]:
    """Each Triton kernel with the types of its arguments, constants and options, for the published VAE."""
    shared = module.shared
    for dtype in (torch.bfloat16, torch.float32):
        like = torch.empty(1, 128, 1, 2, 2, dtype=dtype, device="meta").to(memory_format=torch.channels_last_3d)
        for kernel in (shared.moments_kernel, module.apply_kernel, module.sums_kernel, module.gradient_kernel):
            yield compiled(kernel, dtype, shared.tile(like))
    yield compiled(shared.finish_kernel, torch.float32, shared.rows_of_moments(512 // 32))


def compiled(kernel, dtype: torch.dtype, options: dict) -> tuple:
    """A kernel of this norm or of the spatial one on channels-last tensors, whose channels lie side by side."""
    name, options = "fp32" if dtype == torch.float32 else "bf16", dict(options)
    constants = {n: options.pop(n) for n in kernel.arg_names if n in options}
    constants |= {n: 1 for n in kernel.arg_names if n.endswith("_c") and len(n.split("_")) == 2}  # strides
    wide, types = ("statistics", "ends", "grad_scale", "grad_shift"), {}
    for n in kernel.arg_names:
        if n in ("x", "y", "z", "grad", "grad_x") or n.startswith(("weight", "bias")):
            types[n] = f"*{name}:16"
        elif n in (*wide, "moments", "partials"):
            types[n] = "*fp32:16" if n in wide else "*fp64:16"
        elif n.startswith("first_"):
            types[n] = "*i32:16"
        elif n.startswith("scale_") or n in ("eps", "num_values"):
            types[n] = "fp32"
        else:  # sizes, and the strides that 16 divides
            types[n] = (
                "i32:16" if n in ("channels", "depth") or (n[-2:] in ("_b", "_p", "_t") and n[0] in "xyg") else "i32"
            )
    return kernel, {n: kind for n, kind in types.items() if n not in constants}, constants, options
