"""What a video is made from: every setting checked, and every unset one filled in, before any weight is loaded."""

import math
import os
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .config import ScheduleConfig, TransformerConfig, VAEConfig
from .diffusion.guidance import SCALES
from .diffusion.samplers import SAMPLERS
from .diffusion.schedule import cumulative_alphas, timesteps
from .models.checkpoint import CheckpointError, component_folder, read_config, resolve_folder

MAX_SEED = 2**63 - 1


class SettingsError(ValueError):
    """An argument that does not fit; the message names it, its value and what is valid."""


@dataclass(frozen=True)
class Configs:
    """What a checkpoint folder says of itself."""

    transformer: TransformerConfig
    vae: VAEConfig
    schedule: ScheduleConfig

    @property
    def space_factor(self) -> int:
        return 2 ** (len(self.vae.block_out_channels) - 1)

    @property
    def time_factor(self) -> int:
        return self.vae.temporal_compression_ratio


def read_configs(model: str | os.PathLike) -> Configs:
    """The configs of a published folder, a hub name or "tiny". Raises CheckpointError for what is no checkpoint."""
    root = resolve_folder(model)
    for component in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (root / component).is_dir():
            raise CheckpointError(f"{root} is no checkpoint of a pipeline: the folder {component} is missing in it")
    configs = Configs(
        read_config(TransformerConfig, component_folder(root, "transformer"), root),
        read_config(VAEConfig, component_folder(root, "vae"), root),
        read_config(ScheduleConfig, root / "scheduler", root, "scheduler_config.json"),
    )
    check_configs(configs, root)
    return configs


def check_configs(configs: Configs, root: Path) -> None:
    """Raises CheckpointError for parts that do not work together."""
    channels = configs.vae.latent_channels
    for name in ("in_channels", "out_channels"):
        count = getattr(configs.transformer, name)
        if count != channels:
            what = f"{name} is {count} in the transformer's config, the VAE's latent_channels is {channels}"
            raise CheckpointError(f"{root}: {what}; text-to-video needs equal ones")
    times = configs.transformer.temporal_compression_ratio, configs.time_factor
    if times[0] != times[1]:
        what = f"temporal_compression_ratio is {times[0]} in the transformer, {times[1]} in the VAE"
        raise CheckpointError(f"{root}: {what}")
    try:
        cumulative_alphas(configs.schedule)
    except ValueError as error:
        raise CheckpointError(f"{root / 'scheduler' / 'scheduler_config.json'}: {error}") from error


@dataclass(frozen=True)
class Settings:
    """The settings of one video. None stands for what the checkpoint says; resolved, only `prompt` may be None."""

    prompt: str | None
    negative_prompt: str = ""
    num_frames: int | None = None
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    num_inference_steps: int = 50
    guidance_scale: float = 6.0  # up to 1.0 is no guidance
    dynamic_guidance: str | None = None  # None, "wave" (as released) or "cosine" (as meant)
    sampler: str | None = None  # "ddim" or "dpmpp_2m_sde"
    seed: int | None = None  # None draws one

    def resolve(self, configs: Configs) -> "Settings":
        """The same settings, complete. Raises SettingsError for one that does not fit."""
        if self.prompt is not None and (not isinstance(self.prompt, str) or not self.prompt.strip()):
            raise SettingsError(f"prompt is {self.prompt!r}; say in words what the video shows")
        if not isinstance(self.negative_prompt, str):
            raise SettingsError(f"negative_prompt is {self.negative_prompt!r}; it must be a text, '' for none")
        transformer, factor = configs.transformer, configs.space_factor
        height, width = (size * factor for size in transformer.latent_size)
        known = replace(
            self,
            num_frames=transformer.sample_frames if self.num_frames is None else self.num_frames,
            height=height if self.height is None else self.height,
            width=width if self.width is None else self.width,
            sampler=configs.schedule.sampler if self.sampler is None else self.sampler,
            seed=secrets.randbelow(2**32) if self.seed is None else self.seed,
        )
        known.check_size(configs)
        known.check_sampling(configs)
        return known

    def check_size(self, configs: Configs) -> None:
        most, chunk = configs.transformer.sample_frames, 2 * configs.time_factor
        check_int("num_frames", self.num_frames)
        if self.num_frames % chunk != 1 or not 1 <= self.num_frames <= most:
            nearest = min(range(1, most + 1, chunk), key=lambda n: abs(n - self.num_frames))
            raise SettingsError(
                f"num_frames is {self.num_frames}; this model makes {chunk}N+1 frames from 1 to {most}, "
                f"the nearest is {nearest}"
            )
        unit = configs.space_factor * configs.transformer.patch_size
        for name, size in (("height", self.height), ("width", self.width)):
            check_int(name, size)
            if size < unit or size % unit:
                nearest = max(unit, round(size / unit) * unit)
                what = f"a multiple of {unit} pixels, the nearest is {nearest}"
                raise SettingsError(f"{name} is {size}; it must be {what}")

    def check_sampling(self, configs: Configs) -> None:
        try:
            timesteps(configs.schedule, self.num_inference_steps)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        scale = self.guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or scale < 0:
            what = "a finite number from 0 (up to 1 is no guidance)"
            raise SettingsError(f"guidance_scale is {scale!r}; it must be {what}")
        if self.dynamic_guidance not in (None, "wave", "cosine"):
            raise SettingsError(f"dynamic_guidance is {self.dynamic_guidance!r}; valid: None, 'wave', 'cosine'")
        if self.sampler not in SAMPLERS:
            raise SettingsError(f"sampler is {self.sampler!r}; valid: {', '.join(map(repr, SAMPLERS))}")
        check_int("seed", self.seed)
        if not 0 <= self.seed <= MAX_SEED:
            raise SettingsError(f"seed is {self.seed}; it must be from 0 to {MAX_SEED}")

    def latent_shape(self, configs: Configs) -> tuple[int, int, int, int]:
        """C, T, H, W of the latents that the transformer makes."""
        frames = (self.num_frames - 1) // configs.time_factor + 1
        factor = configs.space_factor
        return configs.vae.latent_channels, frames, self.height // factor, self.width // factor

    def scale_at(self, timestep: int, step_index: int) -> float:
        """The guidance scale of one step."""
        form = SCALES[self.dynamic_guidance or "constant"]
        return form(self.guidance_scale, timestep, step_index, self.num_inference_steps)

    def as_dict(self) -> dict:
        return asdict(self)


def check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SettingsError(f"{name} is {value!r}; it must be a whole number")
