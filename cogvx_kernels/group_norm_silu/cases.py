"""Arguments of `group_norm_silu` for tests (SMALL), fuzzing (`draw`, ILLEGAL) and benchmarks (REAL)."""

import random
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch

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
    *,
    dtype=torch.float32,
    device="cpu",
    seed=0,
    scale=1.0,
) -> tuple:
    normal = Normal(dtype, device, seed)
    return (
        normal(batch, width, frames, height, columns, std=scale, mean=scale / 2),
        normal(width, mean=1.0, std=0.5),
        normal(width, std=0.5),
        normal(batch, width, num_halo, height, columns) if halo else None,
        num_groups,
        1e-6,
        num_halo,
    )


SMALL = [
    partial(make, 2, 8, 3, 5, 7, 4, halo=True),
    partial(make, 1, 8, 1, 4, 4, 2),
    partial(make, 1, 6, 2, 3, 5, 6, num_halo=0),
    partial(make, 1, 64, 2, 4, 4, 32, halo=True),
    partial(make, 1, 3, 2, 1, 1, 1, num_halo=1),
    partial(make, 2, 10, 1, 1, 1, 5, num_halo=3, halo=True),
    partial(make, 1, 34, 5, 7, 11, 17),
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
    )


def kernels(module: ModuleType) -> Iterator[tuple[Any, dict, dict, dict]]:
    """Every Triton kernel with the types of its arguments, constants and options, as for the real cases."""
    shared = module.shared
    rows = shared.rows_of_moments(4)
    moments = {"moments": "*fp64:16", "statistics": "*fp32:16", "num_values": "fp32", "eps": "fp32"}
    yield typed(shared.finish_kernel, moments, rows)
    for dtype in ("bf16", "fp32"):
        for memory_format in (torch.channels_last_3d, torch.contiguous_format):
            pointers, options = arguments(shared, dtype, memory_format)
            for kernel in (shared.moments_kernel, module.apply_kernel, module.sums_kernel, module.gradient_kernel):
                yield typed(kernel, pointers, options)


def arguments(shared: ModuleType, dtype: str, memory_format: torch.memory_format) -> tuple[dict, dict]:
    """Types of what is no multiple of 16, and options with the stride that is 1; also for the spatial norm."""
    x = torch.empty(1, 512, 2, 4, 4, device="meta").contiguous(memory_format=memory_format)
    tensors = ("x", "y", "grad", "grad_x", "weight", "bias")
    types = dict.fromkeys(tensors, f"*{dtype}:16") | dict.fromkeys(("statistics", "ends"), "*fp32:16")
    types |= dict.fromkeys(("moments", "partials"), "*fp64:16") | {"num_copies": "i32"}
    last = memory_format == torch.channels_last_3d
    return types, shared.tile(x) | dict.fromkeys(("x_c", "y_c", "grad_c") if last else ("x_p", "y_p", "grad_p"), 1)


def typed(kernel: Any, types: dict, options: dict) -> tuple[Any, dict, dict, dict]:
    """A kernel with the types of its arguments; those not named are numbers that 16 divides."""
    constants = {name: options[name] for name in kernel.arg_names if name in options}
    others = {name: options[name] for name in ("num_warps", "enable_fp_fusion")}
    signature = {name: types.get(name, "i32:16") for name in kernel.arg_names if name not in constants}
    return kernel, signature, constants, others
