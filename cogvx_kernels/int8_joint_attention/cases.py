"""Arguments of `int8_joint_attention` for tests (SMALL), fuzzing (`draw`, ILLEGAL) and benchmarks (REAL)."""

import random
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch

from ..testing import Normal


def make(
    batch: int, num_heads: int, tokens: int, head_width: int, *, dtype=torch.float32, device="cpu", seed=0, scale=1.0
) -> tuple:
    normal = Normal(dtype, device, seed)
    shape = batch, num_heads, tokens, head_width
    # Larger scores than these overflow float16 itself.
    std = min(scale, 4.0)
    k = normal(*shape, std=std) + normal(1, num_heads, 1, head_width, std=std)
    return normal(*shape, std=std), k, normal(*shape, std=scale)


SMALL = [
    partial(make, 2, 3, 17, 64),
    partial(make, 1, 2, 13, 59),
    partial(make, 1, 1, 7, 111),
    partial(make, 1, 1, 131, 16),
    partial(make, 1, 1, 194, 72),
    partial(make, 1, 2, 1, 8),
    partial(make, 1, 2, 0, 16),
    partial(make, 0, 2, 3, 16),
]

REAL = {
    "2b, 4096 tokens": partial(make, 2, 30, 4096, 64),
    "2b, 49 x 480 x 720": partial(make, 2, 30, 17776, 64),
    "5b, 49 x 480 x 720": partial(make, 2, 48, 17776, 64),
    "1.5-5b, 81 x 768 x 1360": partial(make, 1, 48, 45106, 64),
}

ILLEGAL = [
    ("q", lambda x: x[..., :0]),
    ("k", lambda x: torch.cat([x, x], dim=3)),
    ("v", lambda x: torch.cat([x, x], dim=1)),
]


def largest(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """What the errors of results are in proportion to: not the results, but the values whose weights are rounded."""
    return v.abs().max().item()


def draw(rng: random.Random) -> partial:
    batch, tokens = rng.choice([0, 1, 1, 2, 3]), rng.choice([0, 1, 2, 13, 31, 67, 133])
    return partial(make, batch, rng.choice([1, 2, 3]), tokens, rng.choice([1, 8, 59, 64, 111, 128]))


def kernels(module: ModuleType, capability: int) -> Iterator[tuple]:
    """Kernel, types of its arguments, constants and options, for compiling ahead of time."""
    for dtype, width in (("bf16", 64), ("fp16", 64), ("bf16", 128), ("fp32", 64)):
        torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        for name, smooth in (("quantize", False), ("quantize", True), ("attention", False)):
            kernel = module.KERNELS[name]
            options = module.options(name, torch_dtype, width, capability)
            constants = {name: options.pop(name) for name in kernel.arg_names if name in options}
            if name == "quantize":
                constants |= {"SIZE": 64 if smooth else 128} | ({} if smooth else {"mean": None})
            kinds = dict.fromkeys(("q", "k", "integers"), "*i8:16")
            kinds |= dict.fromkeys(("scales", "q_scales", "k_scales", "mean"), "*fp32:16")
            kinds |= {name: "i32:16" for name in kernel.arg_names if name.endswith(("_b", "_a", "_n"))}
            kinds |= dict.fromkeys(("num_tiles", "num_heads", "num_tokens"), "i32") | {"bits": "fp32"}
            types = {name: kinds.get(name, f"*{dtype}:16") for name in kernel.arg_names if name not in constants}
            yield kernel, types, constants, options
