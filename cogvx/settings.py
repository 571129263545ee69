"""What a video is made from: every setting checked, and every unset one filled in, before any weight is loaded."""

import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .config import ScheduleConfig, TransformerConfig, VAEConfig
from .diffusion.guidance import SCALES
from .diffusion.samplers import SAMPLERS
from .diffusion.schedule import cumulative_alphas, timesteps
from .models.checkpoint import CheckpointError, component_folder, own_or_shared, read_config, resolve_folder
from .models.transformer import OFS
from .numerics import SAT, Numerics

MAX_SEED = 2**63 - 1
MAX_FRAMES = 2**14
LONGER = ("windows", "riflex")  # overlapping windows in time; a lowered frequency of the positions in time


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

    @property
    def takes_image(self) -> bool:
        """Whether the transformer has channels for an image's latents beside the noisy ones."""
        return self.transformer.in_channels == 2 * self.vae.latent_channels

    @property
    def fps(self) -> int:
        """Frames a second of the videos that the model was trained on."""
        return 8 if self.transformer.patch_size_t is None else 16

    @property
    def frame_counts(self) -> range:
        """How many frames the model makes; CogVideoX 1.5 was trained at its config's and at twice as many."""
        trained, patch = self.transformer.sample_frames, self.transformer.patch_size_t
        return range(1, (trained if patch is None else 2 * trained - 1) + 1, 2 * self.time_factor * (patch or 1))


def read_configs(model: str | os.PathLike) -> Configs:
    """The configs of a checkpoint, as `resolve_folder` takes it. Raises CheckpointError for what is none."""
    root = resolve_folder(model)
    for component in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not own_or_shared(root, component).is_dir():
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
    for name, valid in (("in_channels", (channels, 2 * channels)), ("out_channels", (channels,))):
        count = getattr(configs.transformer, name)
        if count not in valid:
            what = f"{name} is {count} in the transformer's config, the VAE's latent_channels is {channels}"
            wanted = "as many, or for image to video twice as many" if len(valid) > 1 else "as many"
            raise CheckpointError(f"{root}: {what}; it must be {wanted}")
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
    guidance_scale: float | Sequence[float] = 6.0  # up to 1.0 is no guidance; or one for each step
    dynamic_guidance: str | None = None  # "constant", "wave" (as released) or "cosine" (as meant)
    sampler: str | None = None  # one of SAMPLERS
    seed: int | None = None  # None draws one
    strength: float | None = None  # of a video to start from: how far towards noise it goes, up to 1; None without one
    ofs: float | None = None  # of 1.5-5B-I2V; None for all others
    longer: str | None = None  # one of LONGER: how a clip longer than trained is made; None allows none

    def resolve(self, configs: Configs, numerics: Numerics = SAT) -> "Settings":
        """The same settings, complete. Raises SettingsError for one that does not fit."""
        if self.prompt is not None and (not isinstance(self.prompt, str) or not self.prompt.strip()):
            raise SettingsError(f"prompt is {self.prompt!r}; say in words what the video shows")
        if not isinstance(self.negative_prompt, str):
            raise SettingsError(f"negative_prompt is {self.negative_prompt!r}; it must be a text, '' for none")
        transformer, factor, counts = configs.transformer, configs.space_factor, configs.frame_counts
        frames = counts[(transformer.sample_frames - 1) // counts.step]
        listed = isinstance(self.guidance_scale, list | tuple)
        form = "constant" if listed else numerics.dynamic_guidance
        sampler = configs.schedule.sampler if numerics.sampler == "folder" else numerics.sampler
        height, width = (size * factor for size in transformer.latent_size)
        known = replace(
            self,
            num_frames=frames if self.num_frames is None else self.num_frames,
            height=height if self.height is None else self.height,
            width=width if self.width is None else self.width,
            guidance_scale=list(self.guidance_scale) if listed else self.guidance_scale,
            dynamic_guidance=form if self.dynamic_guidance is None else self.dynamic_guidance,
            sampler=sampler if self.sampler is None else self.sampler,
            seed=secrets.randbelow(2**32) if self.seed is None else self.seed,
            ofs=OFS if self.ofs is None and transformer.ofs_embed_dim is not None else self.ofs,
        )
        known.check_size(configs)
        known.check_sampling(configs)
        return known

    def check_size(self, configs: Configs) -> None:
        self.check_longer(configs)
        counts = self.frame_counts(configs)
        check_int("num_frames", self.num_frames)
        if self.num_frames not in counts:
            nearest = min(counts, key=lambda n: abs(n - self.num_frames))
            raise SettingsError(
                f"num_frames is {self.num_frames}; this model makes {counts.step}N+1 frames from 1 to {counts[-1]}, "
                f"the nearest is {nearest}{'' if self.longer else '; for more see longer'}"
            )
        unit = configs.space_factor * configs.transformer.patch_size
        for name, size in (("height", self.height), ("width", self.width)):
            check_int(name, size)
            if size < unit or size % unit:
                nearest = max(unit, round(size / unit) * unit)
                what = f"a multiple of {unit} pixels, the nearest is {nearest}"
                raise SettingsError(f"{name} is {size}; it must be {what}")

    def check_longer(self, configs: Configs) -> None:
        if self.longer not in (None, *LONGER):
            raise SettingsError(f"longer is {self.longer!r}; valid: None, {', '.join(map(repr, LONGER))}")
        if self.longer == "riflex" and not configs.transformer.use_rotary_positional_embeddings:
            raise SettingsError("longer is 'riflex'; this model has no rotary positions: use 'windows'")

    def check_sampling(self, configs: Configs) -> None:
        try:
            timesteps(configs.schedule, self.num_inference_steps)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        self.check_strength()
        self.check_guidance()
        if self.sampler not in SAMPLERS:
            raise SettingsError(f"sampler is {self.sampler!r}; valid: {', '.join(map(repr, SAMPLERS))}")
        self.check_ofs(configs)
        check_int("seed", self.seed)
        if not 0 <= self.seed <= MAX_SEED:
            raise SettingsError(f"seed is {self.seed}; it must be from 0 to {MAX_SEED}")

    def check_strength(self) -> None:
        strength, count = self.strength, self.num_inference_steps
        if strength is None:
            return
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
            raise SettingsError(f"strength is {strength!r}; it must be a number above 0, up to 1")
        if self.num_moves < 1:
            what = f"of {count} steps that leaves none, the least is {1 / count:.3g}"
            raise SettingsError(f"strength is {strength}; {what}")

    def check_ofs(self, configs: Configs) -> None:
        takes, ofs = configs.transformer.ofs_embed_dim is not None, self.ofs
        if not takes and ofs is not None:
            raise SettingsError(f"ofs is {ofs!r}; this model takes none, leave it out")
        if takes and (isinstance(ofs, bool) or not isinstance(ofs, int | float) or not math.isfinite(ofs)):
            raise SettingsError(f"ofs is {ofs!r}; it must be a finite number, {OFS} as in training")

    def check_guidance(self) -> None:
        scale, form, count = self.guidance_scale, self.dynamic_guidance, self.num_inference_steps
        if form not in SCALES:
            raise SettingsError(f"dynamic_guidance is {form!r}; valid: None, {', '.join(map(repr, SCALES))}")
        if not isinstance(scale, list):
            check_scale("guidance_scale", scale)
            return
        for i, one in enumerate(scale):
            check_scale(f"guidance_scale of step {i + 1}", one)
        if len(scale) != count:
            what = f"it must hold one for each of the {count} steps of num_inference_steps"
            raise SettingsError(f"guidance_scale holds {len(scale)} scales; {what}")
        if form != "constant":
            raise SettingsError(f"dynamic_guidance is {form!r}; with a guidance_scale for each step it must be None")

    def frame_counts(self, configs: Configs) -> range:
        """How many frames are allowed."""
        counts = configs.frame_counts
        return counts if self.longer is None else range(1, MAX_FRAMES, counts.step)

    def latent_shape(self, configs: Configs) -> tuple[int, int, int, int]:
        """C, T, H, W of the latents that the transformer makes; T in whole patches."""
        frames = (self.num_frames - 1) // configs.time_factor + 1 + self.surplus_latents(configs)
        factor = configs.space_factor
        return configs.vae.latent_channels, frames, self.height // factor, self.width // factor

    def surplus_latents(self, configs: Configs) -> int:
        """How many latent frames, the first ones, only fill up a patch in time and are no part of the video."""
        frames = (self.num_frames - 1) // configs.time_factor + 1
        return -frames % (configs.transformer.patch_size_t or 1)

    @property
    def num_moves(self) -> int:
        """How many of the steps run: with a video to start from only the last ones."""
        count = self.num_inference_steps
        return count if self.strength is None else min(int(count * self.strength), count)

    @property
    def is_guided(self) -> bool:
        """Whether any step looks at the negative prompt."""
        scale = self.guidance_scale
        return max(scale) > 1.0 if isinstance(scale, list) else scale > 1.0

    def scale_at(self, timestep: int, step_index: int) -> float:
        """The guidance scale of one of the steps that run."""
        if isinstance(self.guidance_scale, list):
            return max(self.guidance_scale[step_index - self.num_moves], 1.0)
        return SCALES[self.dynamic_guidance](self.guidance_scale, timestep, step_index, self.num_moves)

    def as_dict(self) -> dict:
        return asdict(self)


def check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SettingsError(f"{name} is {value!r}; it must be a whole number")


def check_scale(name: str, scale: object) -> None:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or scale < 0:
        what = "a finite number from 0 (up to 1 is no guidance)"
        raise SettingsError(f"{name} is {scale!r}; it must be {what}, or a list of one for each step")
