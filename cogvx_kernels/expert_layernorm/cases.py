"""Arguments of `expert_layernorm` for tests (SMALL), fuzzing (`draw`, ILLEGAL) and benchmarks (REAL)."""

import random
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch

from ..testing import Normal


def make(
    batch: int, tokens: int, width: int, num_text: int, *, dtype=torch.float32, device="cpu", seed=0, scale=1.0
) -> tuple:
    normal = Normal(dtype, device, seed)
    return (
        normal(batch, tokens, width, std=scale, mean=scale / 2),
        normal(width, mean=1.0, std=0.5),
        normal(width, std=0.5),
        normal(batch, 2, width, std=0.5),
        normal(batch, 2, width, std=0.5),
        num_text,
        1e-5,
    )


SMALL = [
    partial(make, 2, 11, 64, 3),
    partial(make, 1, 5, 48, 0),
    partial(make, 1, 5, 130, 5),
    partial(make, 3, 7, 59, 2),
    partial(make, 1, 1, 1, 1),
    partial(make, 1, 3, 1031, 1),
    partial(make, 1, 45, 16, 37),
    partial(make, 1, 10, 520, 4),
    partial(make, 2, 0, 16, 0),
    partial(make, 0, 4, 16, 2),
]

REAL = {
    "2b, 49 x 480 x 720": partial(make, 2, 17776, 1920, 226),
    "5b, 49 x 480 x 720": partial(make, 2, 17776, 3072, 226),
    "1.5-5b, 81 x 768 x 1360": partial(make, 1, 45106, 3072, 226),
}

ILLEGAL = [
    ("x", lambda x: x[..., :0]),
    ("weight", lambda x: torch.cat([x, x])),
    ("bias", lambda x: torch.cat([x, x])),
    ("shift", lambda x: x[:, :1]),
    ("scale", lambda x: torch.cat([x, x[:1], x[:1]])),
    ("num_text", lambda _: -1),
    ("num_text", lambda _: 10**6),
    ("eps", lambda _: 0.0),
    ("eps", lambda _: float("nan")),
]


def draw(rng: random.Random) -> partial:
    tokens = rng.choice([0, 1, 2, 7, 13])
    width = rng.choice([1, 2, 8, 59, 64, 111, 257])
    return partial(make, rng.choice([0, 1, 1, 2, 3]), tokens, width, rng.randint(0, tokens))


def kernels(module: ModuleType, capability: int) -> Iterator[tuple]:
    """Each Triton kernel with the types of its arguments, its constants and options, at the widths of the models."""
    for dtype, width in (("bf16", 1920), ("bf16", 3072), ("fp32", 3072)):
        for kernel, rows in (
            (module.forward_kernel, module.FORWARD_ROWS),
            (module.backward_kernel, module.BACKWARD_ROWS),
        ):
            options = module.options(width, rows)
            constants = {name: options.pop(name) for name in kernel.arg_names if name in options}
            types = {name: f"*{dtype}:16" for name in kernel.arg_names if name not in constants}
            types |= {name: "i32:16" for name in types if name == "width" or name.endswith(("_b", "_n", "_m"))}
            types |= {name: "i32" for name in types if name in ("num_rows", "num_text")} | {"eps": "fp32"}
            types |= {"partials": "*fp32:16"} if "partials" in types else {}
            yield kernel, types, constants, options
