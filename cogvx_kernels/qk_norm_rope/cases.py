"""Arguments of `qk_norm_rope` for tests (SMALL), fuzzing (`draw`, ILLEGAL) and benchmarks (REAL)."""

import random
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch

from ..testing import Normal


def make(
    batch: int,
    tokens: int,
    num_text: int,
    num_heads: int,
    head_width: int,
    rope: bool = True,
    narrow: bool = False,  # whether the angles are of `dtype`, so that the rotation is rounded to it
    *,
    dtype=torch.float32,
    device="cpu",
    seed=0,
    scale=1.0,
) -> tuple:
    normal = Normal(dtype, device, seed)
    cos = sin = None
    if rope:
        angles = normal(tokens - num_text, head_width // 2, std=3.0, dtype=torch.float32).repeat_interleave(2, dim=1)
        cos, sin = angles.cos(), angles.sin()
        if narrow or dtype == torch.float64:
            cos, sin = cos.to(dtype), sin.to(dtype)
    return (
        normal(batch, tokens, 3 * num_heads * head_width, std=scale, mean=scale / 2),
        normal(head_width, mean=1.0, std=0.5),
        normal(head_width, std=0.5),
        normal(head_width, mean=1.0, std=0.5),
        normal(head_width, std=0.5),
        cos,
        sin,
        num_text,
        num_heads,
        1e-6,
    )


SMALL = [
    partial(make, 2, 11, 3, 3, 64),
    partial(make, 1, 7, 2, 2, 59, rope=False),
    partial(make, 1, 35, 18, 2, 64),
    partial(make, 2, 21, 3, 2, 64, narrow=True),
    partial(make, 1, 5, 1, 3, 6, narrow=True),
    partial(make, 1, 5, 1, 3, 10, narrow=True),
    partial(make, 1, 5, 0, 1, 64),
    partial(make, 1, 5, 0, 1, 6),
    partial(make, 1, 3, 3, 2, 64),
    partial(make, 1, 5, 5, 2, 8),
    partial(make, 2, 3, 1, 1, 111, rope=False),
    partial(make, 1, 1, 0, 1, 64, rope=False),
    partial(make, 1, 0, 0, 2, 16),
    partial(make, 0, 4, 1, 2, 16),
]

REAL = {
    "2b, 49 x 480 x 720": partial(make, 2, 17776, 226, 30, 64, rope=False),
    "5b, 49 x 480 x 720": partial(make, 2, 17776, 226, 48, 64),
    "1.5-5b, 81 x 768 x 1360": partial(make, 1, 45106, 226, 48, 64),
    "5b, rounded as in training": partial(make, 2, 17776, 226, 48, 64, narrow=True),
}

ILLEGAL = [
    ("qkv", lambda x: x[..., 1:]),
    ("qkv", lambda x: x[..., :0]),
    ("q_weight", lambda x: torch.cat([x, x])),
    ("q_bias", lambda x: torch.cat([x, x])),
    ("k_weight", lambda x: torch.cat([x, x])),
    ("k_bias", lambda x: torch.cat([x, x])),
    ("cos", lambda x: torch.ones(1, 1) if x is None else None),
    ("sin", lambda x: torch.ones(1, 1) if x is None else torch.cat([x, x[:1], torch.ones(1, x.shape[1])])),
    ("num_text", lambda _: -1),
    ("num_text", lambda _: 10**6),
    ("num_heads", lambda _: 0),
    ("num_heads", lambda x: x * 1009),
    ("eps", lambda _: -1e-6),
]


def draw(rng: random.Random) -> partial:
    tokens = rng.choice([0, 1, 2, 7, 13, 31, 50])
    head_width = rng.choice([1, 2, 6, 59, 64, 111, 128])
    rope = head_width % 2 == 0 and rng.random() < 0.7
    return partial(
        make, rng.choice([0, 1, 1, 2]), tokens, rng.randint(0, tokens), rng.choice([1, 2, 3, 5]), head_width, rope,
        narrow=rng.random() < 0.3,
    )  # fmt: skip


def kernels(module: ModuleType, capability: int) -> Iterator[tuple]:
    """Every Triton kernel at the real sizes: kernel, types of its arguments, constants and options."""
    forward, backward = module.forward_kernel, module.backward_kernel
    for dtype, turn, rounded in (
        ("bf16", False, False),
        ("bf16", True, False),
        ("bf16", True, True),
        ("fp32", True, False),
    ):
        wide = {"angles"} | ({"cos", "sin"} if turn and not rounded else set())
        kinds = [(forward, False, module.FORWARD_VALUES)]
        kinds += [(backward, False, module.BACKWARD_VALUES)] if not rounded else []  # gradients are not rounded
        kinds += [(backward, True, module.ANGLE_VALUES)] if turn and not rounded else []
        for kernel, angles, values in kinds:
            types = {name: f"*{'fp32' if name in wide else dtype}:16" for name in kernel.arg_names}
            types |= {name: "i32:16" for name in kernel.arg_names if name.endswith(("_b", "_a", "_n"))}
            types |= {"partials": "*fp64:16"} if "partials" in types else {}
            types |= {"num_rows": "i32", "num_text": "i32", "num_heads": "i32", "width": "i32:16", "eps": "fp32"}
            options = module.options(64, values)
            constants = {"TURN": turn, "ROUNDED": rounded, "ANGLES": angles, "HEADS": module.BACKWARD_HEADS}
            constants |= {name: options.pop(name) for name in ("ROWS", "BLOCK")}
            constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
            yield kernel, {name: types[name] for name in kernel.arg_names if name not in constants}, constants, options
