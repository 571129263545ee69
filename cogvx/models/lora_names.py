"""LoRA as files name it: PEFT and diffusers, SAT, Kohya, CogVideoX-Fun; all become pairs of matrices a layer."""

import json
import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from ..config import MAX_LAYERS
from .names import sat_place
from .stored import CheckpointError, some

IN_BLOCK = ("norm1.linear", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "norm2.linear",
            "ff.net.0.proj", "ff.net.2")  # fmt: skip
ALONE = ("patch_embed.proj", "patch_embed.text_proj", "time_embedding.linear_1", "time_embedding.linear_2",
         "ofs_embedding.linear_1", "ofs_embedding.linear_2", "norm_out.linear", "proj_out")  # fmt: skip
LAYERS = (*ALONE, *(f"transformer_blocks.{i}.{layer}" for i in range(MAX_LAYERS) for layer in IN_BLOCK))
FLAT = {layer.replace(".", "_"): layer for layer in LAYERS}  # as Kohya's scripts write a layer's name

PARTS = {"lora_A": "down", "lora_down": "down", "lora.down": "down", "lora_B": "up", "lora_up": "up", "lora.up": "up"}
DOTTED = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.\w+)?\.weight|(.+)\.alpha")
PREFIX = re.compile(
    r"(base_model\.model\.)?(transformer\.|model\.diffusion_model\.|diffusion_model\.|lora_unet_+|lora_transformer_+)?"
)
SAT = re.compile(r"(?:model\.diffusion_model\.)?(.+)\.matrix_(A|B)\.(\d)")
SAT_ALPHA = 1.0  # the official training's; the file does not hold it


class Pair(NamedTuple):
    """What is added to a layer's weight: scale * up @ down."""

    down: Tensor  # [R, D]
    up: Tensor  # [K, R]
    scale: float


def pairs(tensors: dict[str, Tensor], metadata: dict[str, str], alpha: float | None, source: object) -> dict[str, Pair]:
    """The pair of each layer, by our name. Raises CheckpointError for what is no LoRA of a CogVideoX transformer.

    alpha: in the place of what the file says of it; the scale is alpha / rank.
    """
    found: dict[str, dict[str, Tensor]] = {}
    unknown, is_sat = [], False
    for key, tensor in tensors.items():
        layer, part, sat = parse(key)
        is_sat |= sat
        if layer is None or (part in found.get(layer, {})):
            unknown.append(key)
        else:
            found.setdefault(layer, {})[part] = tensor
    if unknown or not found:
        what = f"{len(unknown)} of {len(tensors)} names are those of no layer here ({some(sorted(unknown))})"
        raise CheckpointError(f"{source} is no LoRA of a CogVideoX transformer: {what}")
    stated = Stated(metadata, source)
    return {name: pair(name, parts, stated, SAT_ALPHA if is_sat else None, alpha, source)
            for name, parts in found.items()}  # fmt: skip


def pair(
    name: str, parts: dict[str, Tensor], stated: "Stated", default: float | None, given: float | None, source: object
) -> Pair:
    """A layer's pair, once its two matrices are there and fit. The first alpha that is known counts."""
    if "down" not in parts or "up" not in parts:
        raise CheckpointError(f"{source}: {name} has no {'up' if 'down' in parts else 'down'} matrix")
    down, up = parts["down"], parts["up"]
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or 0 in down.shape:
        raise CheckpointError(
            f"{source}: {name} has matrices {list(down.shape)} and {list(up.shape)}, which do not fit"
        )
    rank, alpha = down.shape[0], given
    if alpha is None and "alpha" in parts:
        if parts["alpha"].numel() != 1 or parts["alpha"].is_complex():
            raise CheckpointError(f"{source}: {name} has an alpha of shape {list(parts['alpha'].shape)}")
        alpha = parts["alpha"].item()
    for other in (stated.alpha(name), default, rank):
        alpha = other if alpha is None else alpha
    return Pair(down, up, float(alpha) / (rank**0.5 if stated.root else rank))


def parse(key: str) -> tuple[str | None, str, bool]:
    """Our name of the layer that a tensor changes or None, which part of the pair it is, and whether SAT named it."""
    match = SAT.fullmatch(key)
    if match:
        name, letter, part = match.groups()
        return SAT_LAYERS.get((name, int(part))), "down" if letter == "A" else "up", True
    match = DOTTED.fullmatch(key)
    if not match:
        return None, "", False
    name, part = match[1] or match[3], PARTS.get(match[2], "alpha")
    name = name[PREFIX.match(name).end() :]
    return (name if name in ALL else FLAT.get(name)), part, False


class Stated:
    """What a file's header says of the LoRA, as diffusers and PEFT write it."""

    def __init__(self, metadata: dict[str, str], source: object):
        try:
            content = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise CheckpointError(f"{source}: the lora_adapter_metadata in its header is no valid JSON object")
        content = {key.removeprefix("transformer."): value for key, value in content.items()}
        if content.get("use_dora"):
            raise CheckpointError(f"{source} is a DoRA, which is more than a LoRA and not supported")
        self.root = bool(content.get("use_rslora"))  # the scale is alpha / sqrt(rank)
        self.every = number(content.get("lora_alpha"))
        patterns = content.get("alpha_pattern")
        self.patterns = patterns if isinstance(patterns, dict) else {}

    def alpha(self, name: str) -> float | None:
        for ending, value in self.patterns.items():
            if name == ending or name.endswith(f".{ending}"):
                return number(value)
        return self.every


def number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6 else None


def _sat_layers(names: Iterable[str]) -> dict[tuple[str, int], str]:
    places = {name: sat_place("transformer", f"{name}.weight") for name in names}
    return {(p.name.removesuffix(".weight"), p.taken[0]): n for n, p in places.items() if len(p.taken) == 1}


ALL = frozenset(LAYERS)
SAT_LAYERS = _sat_layers(LAYERS)
