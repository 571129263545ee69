"""Names of the published files to ours, which are those of diffusers, and back; nothing is read here.

A file may put a prefix before each name. SAT, the official training code, has names of its own: q, k and v are one
tensor there, and so is the modulation of both norms of a block.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .stored import CheckpointError, Stored, some

PREFIXES = {
    "transformer": ("", "transformer.", "model.diffusion_model.", "diffusion_model."),
    "vae": ("", "vae.", "first_stage_model."),
}
# Before the names of parts that a file may hold beside the one that is asked for.
OTHERS = ("text_encoder.", "text_encoders.", "conditioner.", "cond_stage_model.", "model_ema.", "loss.", "denoiser.")
# A tensor that every file of the kind holds: by our name, and by SAT's.
MARKERS = {
    "transformer": ("norm_final.weight", "transformer.final_layernorm.weight"),
    "vae": ("encoder.down_blocks.0.resnets.0.conv1.conv.weight", "encoder.down.0.block.0.conv1.conv.weight"),
}
# What SAT stores and our models compute.
COMPUTED = re.compile(
    r"mixins\.pos_embed\.(freqs_(sin|cos)|pos_embedding)|transformer\.\w+_embeddings\.weight|loss\..*"
)


class Place(NamedTuple):
    """Where one of our tensors lies in a SAT file: `taken` of the equal `parts` of a tensor's first axis."""

    name: str
    parts: int = 1
    taken: tuple[int, ...] = (0,)


class Found(NamedTuple):
    """A part in a file: the prefix that its names have there, and whether they are SAT's."""

    component: str
    prefix: str
    sat: bool


def find(names: Iterable[str], component: str | None, source: object) -> Found:
    """The part that a file holds, by its names. Raises CheckpointError where none is there, or more than one is."""
    names = set(names)
    found = [
        Found(part, prefix, sat)
        for part, prefixes in PREFIXES.items()
        for prefix in prefixes
        for sat, marker in enumerate(MARKERS[part])
        if component in (None, part) and prefix + marker in names
    ]
    if not found:
        what = component or "transformer or vae"
        raise CheckpointError(
            f"{source} holds no {what} of CogVideoX: none of its {len(names)} names is known ({some(sorted(names))})"
        )
    if len(found) > 1:
        parts = sorted({f"{part.component} as {part.prefix or 'no prefix'}" for part in found})
        raise CheckpointError(
            f"{source} holds {' and '.join(parts)}; it must hold one, or say which component is meant"
        )
    return Found(found[0].component, found[0].prefix, bool(found[0].sat))


def by_our_names(
    stored: Iterable[tuple[str, Stored]], found: Found, expected: Iterable[str]
) -> tuple[list[tuple[str, Stored]], list[str]]:
    """The tensors of one part by our names, unknown ones by their own; and the names that are left out."""
    stored = list(stored)
    own = [(key[len(found.prefix) :], tensor) for key, tensor in stored if _is_own(key, found)]
    left_out = [key for key, _ in stored if not _is_own(key, found)]
    if not found.sat:
        return own, left_out
    given = dict(own)
    places = {name: sat_place(found.component, name) for name in expected}
    ours = [(n, given[p.name].rows(p.parts, p.taken)) for n, p in places.items() if p.name in given]
    used = {place.name for place in places.values()}
    rest = [(key, tensor) for key, tensor in own if key not in used and not COMPUTED.fullmatch(key)]
    computed = [found.prefix + key for key, _ in own if key not in used and COMPUTED.fullmatch(key)]
    return ours + rest, left_out + computed


def _is_own(key: str, found: Found) -> bool:
    others = [p for part, prefixes in PREFIXES.items() if part != found.component for p in prefixes if p]
    return key.startswith(found.prefix) and (bool(found.prefix) or not key.startswith((*others, *OTHERS)))


def to_sat(component: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a transformer or VAE as SAT names and joins them; its prefix is left to the caller."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        place = sat_place(component, name)
        chunks = tensor.chunk(len(place.taken))
        pieces.setdefault(place.name, {}).update(zip(place.taken, chunks, strict=True))
    return {
        name: torch.cat([parts[i] for i in sorted(parts)]) if len(parts) > 1 else parts[0]
        for name, parts in pieces.items()
    }


def sat_place(component: str, name: str) -> Place:
    """Where one of our tensors lies in a SAT file."""
    for pattern, place in SAT_PLACES[component]:
        match = re.fullmatch(pattern, name)
        if match:
            return place(*match.groups())
    return Place(name)


def _same(template: str, parts: int = 1, *taken: int) -> Callable[..., Place]:
    return lambda *groups: Place(template.format(*groups), parts, taken or (0,))


_LAYER, _MIXIN = "transformer.layers.{}.", "mixins.adaln_layer."
_BLOCK = r"transformer_blocks\.(\d+)\."
SAT_PLACES: dict[str, list[tuple[str, Callable[..., Place]]]] = {
    "transformer": [
        (_BLOCK + r"attn1\.to_q\.(\w+)", _same(_LAYER + "attention.query_key_value.{}", 3, 0)),
        (_BLOCK + r"attn1\.to_k\.(\w+)", _same(_LAYER + "attention.query_key_value.{}", 3, 1)),
        (_BLOCK + r"attn1\.to_v\.(\w+)", _same(_LAYER + "attention.query_key_value.{}", 3, 2)),
        (_BLOCK + r"attn1\.to_out\.0\.(\w+)", _same(_LAYER + "attention.dense.{}")),
        (_BLOCK + r"attn1\.norm_q\.(\w+)", _same(_MIXIN + "query_layernorm_list.{}.{}")),
        (_BLOCK + r"attn1\.norm_k\.(\w+)", _same(_MIXIN + "key_layernorm_list.{}.{}")),
        (_BLOCK + r"ff\.net\.0\.proj\.(\w+)", _same(_LAYER + "mlp.dense_h_to_4h.{}")),
        (_BLOCK + r"ff\.net\.2\.(\w+)", _same(_LAYER + "mlp.dense_4h_to_h.{}")),
        (_BLOCK + r"norm1\.norm\.(\w+)", _same(_LAYER + "input_layernorm.{}")),
        (_BLOCK + r"norm2\.norm\.(\w+)", _same(_LAYER + "post_attention_layernorm.{}")),
        # SAT's twelve: shift, scale, gate of vision before attention and before the MLP, then of text; ours: 6 and 6.
        (_BLOCK + r"norm1\.linear\.(\w+)", _same(_MIXIN + "adaLN_modulations.{}.1.{}", 12, 0, 1, 2, 6, 7, 8)),
        (_BLOCK + r"norm2\.linear\.(\w+)", _same(_MIXIN + "adaLN_modulations.{}.1.{}", 12, 3, 4, 5, 9, 10, 11)),
        (r"time_embedding\.linear_1\.(\w+)", _same("time_embed.0.{}")),
        (r"time_embedding\.linear_2\.(\w+)", _same("time_embed.2.{}")),
        (r"ofs_embedding\.linear_1\.(\w+)", _same("ofs_embed.0.{}")),
        (r"ofs_embedding\.linear_2\.(\w+)", _same("ofs_embed.2.{}")),
        (r"patch_embed\.((?:text_)?proj\.\w+)", _same("mixins.patch_embed.{}")),
        (r"patch_embed\.pos_embedding", _same("mixins.pos_embed.pos_embedding")),
        (r"norm_final\.(\w+)", _same("transformer.final_layernorm.{}")),
        (r"norm_out\.norm\.(\w+)", _same("mixins.final_layer.norm_final.{}")),
        (r"norm_out\.linear\.(\w+)", _same("mixins.final_layer.adaLN_modulation.1.{}")),
        (r"proj_out\.(\w+)", _same("mixins.final_layer.linear.{}")),
    ],
    "vae": [
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.(.+)", _same("encoder.down.{}.downsample.{}")),
        (
            r"(en|de)coder\.mid_block\.resnets\.(\d+)\.(.+)",
            lambda half, i, rest: Place(f"{half}coder.mid.block_{int(i) + 1}.{_shortcut(rest)}"),
        ),
        (
            r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.(.+)",
            lambda level, i, rest: Place(f"encoder.down.{level}.block.{i}.{_shortcut(rest)}"),
        ),
        (
            r"decoder\.up_blocks\.([0-3])\.resnets\.(\d+)\.(.+)",
            lambda level, i, rest: Place(f"decoder.up.{3 - int(level)}.block.{i}.{_shortcut(rest)}"),
        ),
        (
            r"decoder\.up_blocks\.([0-3])\.upsamplers\.0\.(.+)",
            lambda level, rest: Place(f"decoder.up.{3 - int(level)}.upsample.{rest}"),
        ),
    ],
}


def _shortcut(name: str) -> str:
    return name.replace("conv_shortcut", "nin_shortcut")
