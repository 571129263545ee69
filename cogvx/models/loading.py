"""A transformer or VAE from a published folder, or from one file."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..config import PRESETS, Published, TransformerConfig, VAEConfig
from .checkpoint import (
    EMBEDDED,
    MAX_JSON_BYTES,
    check_device,
    check_dtype,
    component_folder,
    fill,
    load_weights,
    read_config,
    resolve_folder,
    save_tensors,
)
from .names import Found, by_our_names, find, sat_place
from .quantized import DTYPE, is_fp8, opened_gguf, unscaled
from .stored import CheckpointError, Stored, one_line, opened, opened_file

Model = TypeVar("Model", bound=nn.Module)
ConfigLike = Published | str | os.PathLike | None  # a config, a preset's name, a checkpoint's folder
CONFIGS = {"transformer": TransformerConfig, "vae": VAEConfig}
GGUF = ".gguf"
FILES = (".safetensors", GGUF)


def load_model(
    model_class: type[Model],
    component: str,
    source: str | Path,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    config: ConfigLike = None,
) -> Model:
    """The model in a component's folder, in the `component` of a pipeline's folder, or in a single file.

    config: of a single file that does not say it itself; for a transformer of a released size it is known from that.
    """
    check_dtype(dtype)
    check_device(device)
    path = Path(source)
    if path.suffix in FILES and os.path.isfile(path):
        return load_file(model_class, component, path, dtype, device, config).model
    if path.suffix in FILES:
        raise CheckpointError(f"{path} does not exist; give a safetensors or GGUF file")
    root = resolve_folder(source)
    if config is not None:
        raise CheckpointError(f"config is given, but {source} is no single file; a folder has its own")
    part = component_folder(root, component)
    model = hollow(model_class, read_config(CONFIGS[component], part, root))
    load_weights(model, part, root, dtype, device)
    return model.eval()


def hollow(model_class: type[Model], config: Published) -> Model:
    """A model without weights: no memory and no time for those that are about to be replaced."""
    with torch.device("meta"):
        return model_class(config)


@dataclass(frozen=True)
class SourceFile:
    """The single file that a model came from."""

    path: Path

    @cached_property
    def sha256(self) -> str:
        with open(self.path, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()


class Loaded(NamedTuple):
    model: Any
    left_out: list[str]  # names in the file that the model has no place for


def load_file(
    model_class: type[Model],
    component: str,
    file: Path,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    config: ConfigLike = None,
) -> Loaded:
    """The model in a safetensors or GGUF file, under any of the usual prefixes, by diffusers' names or SAT's.

    dtype: None is what is stored, and bf16 for GGUF and fp8.
    """
    with content_of(file) as (stored, metadata):
        found = find((name for name, _ in stored), component, file)
        known = pick_config(component, config, metadata, stored, found, file)
        dtype = DTYPE if dtype is None and (file.suffix == GGUF or is_fp8(stored)) else dtype
        return take(model_class, known, unscaled(stored), found, file, dtype, device)


@contextmanager
def content_of(file: Path) -> Iterator[tuple[list[tuple[str, Stored]], dict[str, str]]]:
    """What a single file holds, and the words in its header."""
    if file.suffix == GGUF:
        yield opened_gguf(file), {}
        return
    with opened_file(file) as content:
        metadata = content.metadata() or {}
    with opened([file]) as stored:
        yield stored, metadata


def take(
    model_class: type[Model],
    config: Published,
    stored: Iterable[tuple[str, Stored]],
    found: Found,
    file: Path,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Loaded:
    """The model of a config from what a file holds."""
    model = hollow(model_class, config)
    ours, left_out = by_our_names(stored, found, model.state_dict())
    fill(model, ours, file, dtype, device, {})
    model.file = SourceFile(file)
    return Loaded(model.eval(), left_out)


def save_single(model: nn.Module, file: str | Path, prefix: str = "") -> None:
    """Write a transformer or VAE as one safetensors file that says its config too."""
    config = json.dumps(model.config.to_dict(), sort_keys=True)
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    save_tensors(weights, file, {"format": "pt", "config": config})


def pick_config(
    component: str,
    config: ConfigLike,
    metadata: dict[str, str],
    stored: Iterable[tuple[str, Stored]],
    found: Found,
    file: Path,
) -> Published:
    """The config of a model in a file: the one that is given, the one that it states, or the released model's."""
    config_class = CONFIGS[component]
    if config is not None:
        return given_config(component, config)
    if "config" in metadata:
        try:
            if len(metadata["config"]) > MAX_JSON_BYTES:
                raise ValueError("it is too long")
            return config_class.from_dict(json.loads(metadata["config"]))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: the config in its header: {one_line(error)}") from error
    shapes = {name.removeprefix(found.prefix): tensor.shape for name, tensor in stored if name.startswith(found.prefix)}
    if component == "transformer":
        size = Size.of_shapes(shapes, found.sat, file)
        for name, preset in PRESETS.items():
            if name not in EMBEDDED and Size.of_config(preset.transformer) == size:
                return preset.transformer
        raise CheckpointError(f"{file} is no released transformer ({size}) and states no config; give one")
    names = ", ".join(name for name in PRESETS if name not in EMBEDDED)
    raise CheckpointError(f"{file} does not say which model's VAE it is; give config, one of {names}, or a folder")


def given_config(component: str, config: ConfigLike) -> Published:
    """A config from a preset's name or a checkpoint's folder, or as it is. Raises ValueError for what is none."""
    if isinstance(config, CONFIGS[component]):
        return config
    if isinstance(config, Published):
        raise ValueError(f"config is a {type(config).__name__}; it must be a {CONFIGS[component].__name__}")
    if config in PRESETS:
        return getattr(PRESETS[config], component)
    if not os.path.isdir(config):
        raise ValueError(f"config is {config!r}; it must be one of {', '.join(PRESETS)}, or a checkpoint's folder")
    root = Path(config)
    return read_config(CONFIGS[component], component_folder(root, component), root)


@dataclass(frozen=True)
class Size:
    """What tells the released transformers apart."""

    layers: int
    width: int
    head_width: int
    in_channels: int
    patches_in_time: bool
    ofs: bool

    @classmethod
    def of_config(cls, config: TransformerConfig) -> "Size":
        head, timed, ofs = config.attention_head_dim, config.patch_size_t is not None, config.ofs_embed_dim is not None
        return cls(config.num_layers, config.width, head, config.in_channels, timed, ofs)

    @classmethod
    def of_shapes(cls, shapes: dict[str, list[int]], sat: bool, file: Path) -> "Size":
        def shape(name: str) -> list[int]:
            found = shapes.get(sat_place("transformer", name).name if sat else name)
            return found or [0]

        patch = shape("patch_embed.proj.weight")
        timed = len(patch) == 2
        layers = 0
        while shape(f"transformer_blocks.{layers}.norm1.norm.weight") != [0]:
            layers += 1
        return cls(
            layers,
            shape("norm_final.weight")[0],
            shape("transformer_blocks.0.attn1.norm_q.weight")[0],
            (patch[1] // 8 if timed else patch[1]) if len(patch) > 1 else 0,
            timed,
            shape("ofs_embedding.linear_1.weight") != [0],
        )

    def __str__(self) -> str:
        kind = f"patches {'in time' if self.patches_in_time else 'of one frame'}{', an ofs' if self.ofs else ''}"
        return f"{self.layers} layers, width {self.width}, {self.in_channels} channels in, {kind}"
