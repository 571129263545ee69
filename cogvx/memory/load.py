"""The parts of a checkpoint, each where a plan wants it to wait."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.choices import num_text_tokens
from ..models.lora import load_lora, read_lora
from ..models.lora_names import Pair
from ..models.text import TextEncoder
from ..models.transformer import ExpertTransformer
from ..models.vae import CausalVAE
from ..numerics import Numerics
from ..parts import check_folder, dtype_on, load_part
from ..settings import Configs, Settings, SettingsError
from ..speed import Speed
from .choose import plan_for
from .placed import round_weights
from .plan import Plan, check_weights
from .predict import Job

Parts = tuple[ExpertTransformer, CausalVAE, TextEncoder]
File = str | os.PathLike | None


@dataclass(frozen=True)
class Files:
    """A checkpoint's folder, and what takes the place of its parts or comes beside them."""

    folder: Path
    configs: Configs
    transformer: File = None
    vae: File = None
    loras: Sequence[tuple[str | os.PathLike, float]] = ()  # each with how much it counts

    def dtypes_on(self, device: torch.device, dtype: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
        """What the transformer and the VAE will be computed in."""
        transformer = dtype_on(
            device, ExpertTransformer, self.folder, self.transformer, self.configs.transformer, dtype
        )
        return transformer, dtype_on(device, CausalVAE, self.folder, self.vae, self.configs.vae, dtype)

    def load(self, dtypes: Sequence[torch.dtype | None], length: int, device: Any) -> Parts:
        transformer = load_part(
            ExpertTransformer, self.folder, self.transformer, self.configs.transformer, dtypes[0], device
        )
        vae = load_part(CausalVAE, self.folder, self.vae, self.configs.vae, dtypes[1], device)
        return transformer, vae, TextEncoder.from_pretrained(
            self.folder, length, transformer.proj_out.weight.dtype, device
        )  # fmt: skip


def load_planned(
    make: Callable[..., Any],  # the class `Pipeline`
    files: Files,
    dtype: torch.dtype | None,
    device: torch.device,
    numerics: Numerics,
    memory: str | Plan | None,
    weights: str | None,
    planned_for: Settings | None,
    speed: Speed | None,
) -> tuple[Parts, Plan | None, Settings | None]:
    """Transformer, VAE and text encoder; the plan that they are loaded for, None without one; and for what video.

    Every part is computed in the dtype that it has without a plan. Raises CheckpointError for files that are none or do
    not fit, SettingsError for LoRAs, PlanError as `plan_for` does.
    """
    check_folder(files.folder, files.configs, files.transformer, files.vae)
    check_weights(weights)
    speed = speed or Speed()
    length, plan, place, dtypes = num_text_tokens(files.configs.transformer, numerics), None, device, (dtype, dtype)
    if memory is not None or weights is not None:
        dtypes, place = files.dtypes_on(device, dtype), "cpu"
        text = TextEncoder.from_pretrained(files.folder, length, device="meta").model
        job = Job(
            files.configs, planned_for or Settings("any").resolve(files.configs, numerics), dtypes[0], text.config,
            device.type, numerics, dtypes[1], text.shared.weight.dtype, weights, speed.weights,
            tuple(without_values(read_lora(file)) for file, _ in files.loras),
        )  # fmt: skip
        plan, planned_for = plan_for(make, memory, job, device)
        speed.check_weights(plan.weights)
    parts = files.load(dtypes, length, place)
    if plan is not None:
        round_weights(plan, {"transformer": parts[0]}, device)  # before LoRAs come beside them
    for file, weight in files.loras:
        try:
            load_lora(parts[0], file, weight)
        except ValueError as error:
            raise SettingsError(str(error)) from error
    return parts, plan, planned_for


def without_values(lora: dict[str, Pair]) -> dict[str, Pair]:
    return {layer: Pair(pair.down.to("meta"), pair.up.to("meta"), pair.scale) for layer, pair in lora.items()}
