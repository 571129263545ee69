"""Arguments of `joint_attention` for tests (SMALL), fuzzing (`draw`, ILLEGAL) and benchmarks (REAL)."""

import random
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch

from ..testing import Normal


def make(
    batch: int,
    num_heads: int,
    tokens: int,
    head_width: int,
    lengths: list[int] | None = None,
    return_lse: bool = False,
    *,
    dtype=torch.float32,
    device="cpu",
    seed=0,
    scale=1.0,
) -> tuple:
    normal = Normal(dtype, device, seed)
    shape = batch, num_heads, tokens, head_width
    # With larger scores weights are 0 or 1 and turn on a score's last bits, in plain PyTorch as well; trained models,
    # whose q and k are normed, have none.
    std = min(scale, 2.0)
    return normal(*shape, std=std), normal(*shape, std=std), normal(*shape, std=scale), lengths, return_lse


SMALL = [
    partial(make, 2, 3, 17, 64),
    partial(make, 1, 2, 13, 59, return_lse=True),
    partial(make, 1, 1, 7, 111),
    partial(make, 1, 2, 1, 16, return_lse=True),
    partial(make, 1, 2, 19, 64, lengths=[7, 1, 11]),
    partial(make, 1, 1, 5, 8, lengths=[5]),
    partial(make, 1, 1, 133, 32),
    partial(make, 1, 1, 144, 16, lengths=[131, 13], return_lse=True),
    partial(make, 1, 1, 194, 72, lengths=[193, 1]),
    partial(make, 1, 1, 33, 128, return_lse=True),
    partial(make, 1, 2, 0, 16),
    partial(make, 0, 2, 3, 16, return_lse=True),
]

REAL = {
    "2b, 4096 tokens": partial(make, 2, 30, 4096, 64),
    "2b, 49 x 480 x 720": partial(make, 2, 30, 17776, 64),
    "5b, 49 x 480 x 720": partial(make, 2, 48, 17776, 64),
    "2b, 4096 tokens, with lse": partial(make, 2, 30, 4096, 64, return_lse=True),
    "1.5-5b, 81 x 768 x 1360": partial(make, 1, 48, 45106, 64),
}

ILLEGAL = [
    ("q", lambda x: x[..., :0]),
    ("k", lambda x: torch.cat([x, x], dim=3)),
    ("v", lambda x: torch.cat([x, x], dim=1)),
    ("lengths", lambda _: [1, 10**6]),
    ("lengths", lambda _: [-1, 2]),
    ("lengths", lambda _: [0]),
    ("lengths", lambda _: 3),
    ("return_lse", lambda _: None),
]


def draw(rng: random.Random) -> partial:
    lengths = None
    batch, heads, tokens = rng.choice([0, 1, 1, 2, 3]), rng.choice([1, 2, 3, 5]), rng.choice([0, 1, 2, 13, 31, 67, 131])
    if rng.random() < 0.4:
        lengths = [rng.choice([1, 2, 7, 13, 31]) for _ in range(rng.randint(1, 4))]
        batch, tokens = 1, sum(lengths)
    if batch * heads > 2 and tokens > 31:  # an interpreted kernel takes seconds for each head of several tiles
        batch, heads = min(batch, 1), 2
    return partial(make, batch, heads, tokens, rng.choice([1, 8, 59, 64, 111, 128]), lengths, rng.random() < 0.4)


def kernels(module: ModuleType, capability: int) -> Iterator[tuple]:
    """Kernel, types of its arguments, constants and options, for compiling ahead of time."""
    whole = [("bf16", 64), ("bf16", 128), ("fp32", 64), ("fp32", 128)]
    calls = [(*one, False, False) for one in whole] + [("bf16", 64, True, False), ("bf16", 64, False, True)]
    for dtype, width, packed, lse in calls:
        for name, kernel in module.KERNELS.items():
            options = module.options(name, torch.float32 if dtype == "fp32" else torch.bfloat16, width, capability)
            constants = {name: options.pop(name) for name in kernel.arg_names if name in options}
            absent = {"tiles": not packed, "lse": not lse, "grad_lse": not lse}
            constants |= {argument: None for argument in kernel.arg_names if absent.get(argument)}
            kinds = {"tiles": "*i32:16", "scale": "fp32"}
            kinds |= dict.fromkeys(("peaks", "shares", "deltas", "lse", "grad_lse"), "*fp32:16")
            kinds |= {name: "i32:16" for name in kernel.arg_names if name.endswith(("_b", "_a", "_n"))}
            kinds |= dict.fromkeys(("num_tiles", "num_heads", "num_tokens"), "i32")
            types = {name: kinds.get(name, f"*{dtype}:16") for name in kernel.arg_names if name not in constants}
            yield kernel, types, constants, options
