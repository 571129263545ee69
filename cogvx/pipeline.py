"""Text, images and video in, video out, in five visible steps: settings, text, start, sampling, frames."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .clip import Clip
from .config import Published
from .data.pixels import to_frames
from .denoise import denoiser
from .diffusion.samplers import SAMPLERS
from .diffusion.schedule import Step, sampling_steps
from .finite import NonFiniteError, all_finite, check_finite
from .inputs import NAMES, Inputs, Picture, Video, planned
from .machine import computable, environment, peak_memory, pick_device
from .models.checkpoint import CheckpointError, resolve_folder
from .models.choices import decode_chunks, first_alone, last_norm_eps, num_text_tokens
from .models.files import files_beside
from .models.saving import content_hash, new_folder, write_json
from .models.text import TextEncoder
from .models.transformer import ExpertTransformer
from .models.vae import CausalVAE
from .numerics import SAT, Numerics, read_numerics
from .settings import Configs, Settings, SettingsError, read_configs
from .start import Start, prepare

MODEL_INDEX = {
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLCogVideoX"],
}

# (pipeline, step index, timestep, {"latents": ...}) -> a dict that may hold other latents to go on with, or None
OnStepEnd = Callable[["Pipeline", int, int, dict], dict | None]


class Pipeline:
    """Makes videos with one checkpoint."""

    def __init__(
        self,
        transformer: ExpertTransformer,
        vae: CausalVAE,
        text_encoder: TextEncoder,
        configs: Configs,
        source: str = "",
        folder: Path | None = None,
        numerics: Numerics = SAT,
    ):
        self.transformer, self.vae, self.text_encoder = transformer.eval(), vae.eval(), text_encoder
        self.configs, self.source, self.folder = configs, source, folder
        self.numerics = numerics
        self.transformer.norm_out.norm.eps = last_norm_eps(configs.transformer, numerics)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike = "tiny",
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        numerics: str | dict | Numerics = "sat",
        transformer: str | os.PathLike | None = None,
        vae: str | os.PathLike | None = None,
    ) -> "Pipeline":
        """Load a published folder, a hub name, or "tiny", the checkpoint inside this package.

        dtype: None keeps the stored one, except that fp16 is computed in fp32 on a CPU. device: None takes a GPU where
        there is one. numerics: "sat", what the weights were trained with, "diffusers", or the choices one by one, a
        `cogvx.numerics.Numerics`.

        transformer, vae: a safetensors or GGUF file in the place of the folder's. Raises ValueError for what is no
        checkpoint, with the reason.
        """
        choices = read_numerics(numerics)
        configs, folder, device = read_configs(model), resolve_folder(model), pick_device(device)
        check_folder(folder, configs, transformer, vae)
        transformer = load_part(ExpertTransformer, folder, transformer, configs.transformer, dtype, device)
        vae = load_part(CausalVAE, folder, vae, configs.vae, dtype, device)
        length = num_text_tokens(configs.transformer, choices)
        text_encoder = TextEncoder.from_pretrained(folder, length, transformer.proj_out.weight.dtype, device)
        return cls(transformer, vae, text_encoder, configs, os.fspath(model), folder, choices)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the published folder layout, which diffusers loads too."""
        with new_folder(folder) as partial:
            self.transformer.save_pretrained(partial / "transformer")
            self.vae.save_pretrained(partial / "vae")
            self.text_encoder.save_pretrained(partial)
            (partial / "scheduler").mkdir()
            scheduler = self.configs.schedule.to_dict()
            write_json(partial / "scheduler" / "scheduler_config.json", scheduler)
            name = "CogVideoXImageToVideoPipeline" if self.configs.takes_image else "CogVideoXPipeline"
            index = {"_class_name": name, **MODEL_INDEX, "scheduler": ["diffusers", scheduler["_class_name"]]}
            write_json(partial / "model_index.json", index)

    def release_modulation(self, num_inference_steps: int = 50) -> None:
        """Free the weights that modulate the transformer, a fifth of 2B's, a seventh of 5B's.

        What they compute for this number of steps is kept; calls with another number then raise ValueError, and so do
        saving and training.
        """
        self.transformer.release_modulation([step.timestep for step in self.steps(num_inference_steps)])

    def steps(self, num_inference_steps: int) -> list[Step]:
        """The moves of a sampler under this pipeline's numerics."""
        how = self.numerics
        return sampling_steps(self.configs.schedule, num_inference_steps, how.rounding, how.moves, how.zero_snr)

    @property
    def device(self) -> torch.device:
        return self.transformer.proj_out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.proj_out.weight.dtype

    @cached_property
    def model_hash(self) -> str:
        """SHA-256 over the checkpoint's weights; '' for a pipeline that was not loaded from a folder."""
        return "" if self.folder is None else content_hash(self.folder)

    def __call__(
        self,
        prompt: str | None = None,
        image: Picture | None = None,
        last_image: Picture | None = None,
        video: Video | None = None,
        mask: Picture | Video | None = None,
        strength: float | None = 0.8,
        negative_prompt: str = "",
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | Sequence[float] = 6.0,
        dynamic_guidance: str | None = None,
        sampler: str | None = None,
        seed: int | None = None,
        ofs: float | None = None,
        longer: str | None = None,
        latents: Tensor | None = None,  # [1, C, T, H, W], the noise to start from
        prompt_embeds: Tensor | None = None,  # [1, L, D]
        negative_prompt_embeds: Tensor | None = None,  # [1, L, D]
        callback_on_step_end: OnStepEnd | None = None,
        progress: bool = True,
    ) -> Clip:
        """Make a video of the prompt; None stands for what the checkpoint's folder says, for the seed a fresh one.

        image, last_image: the first and the last frame, for a model that takes images; files, arrays or Pillow images,
        which are scaled to cover the video and cut around the centre. video: what to start from, a file, an array or a
        Clip, of which as many frames are taken as are made; strength: how far it goes back towards noise first, from
        above 0 to 1, all the way. mask: an image for all frames or a video, white where the video is made anew; all
        other pixels stay as they are. longer: allows more frames than trained, seen by the model in overlapping
        "windows", or all at once with positions after "riflex".

        Raises: SettingsError, a ValueError, that names an argument that does not fit, its value and the nearest valid
        one; NonFiniteError when a computation leaves the finite numbers, with the step and the module.
        """
        settings, inputs = planned(
            Settings(
                prompt, negative_prompt, num_frames, height, width, num_inference_steps, guidance_scale,
                dynamic_guidance, sampler, seed, strength, ofs, longer,
            ),
            Inputs.read(image, last_image, video, mask), self.configs, self.numerics,
        )  # fmt: skip
        given = {"latents": latents, "prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        self.check_given(settings, given)
        return self.generate([settings], inputs, given, callback_on_step_end, progress)[0]

    def batch(
        self,
        prompts: Sequence[str],
        num_videos_per_prompt: int = 1,
        seed: int | None = None,
        batch_size: int = 1,
        progress: bool = True,
        **settings,
    ) -> list[Clip]:
        """Videos of several prompts, prompt by prompt: clip i is what `seed + i` gives alone.

        With a batch_size above one clips are computed together, which a small model repays, and equal the clip alone
        within one level of 255. Takes the settings of a single call as keywords beside.
        """
        return list(self.stream(prompts, num_videos_per_prompt, seed, batch_size, progress, **settings))

    def stream(
        self,
        prompts: Sequence[str],
        num_videos_per_prompt: int = 1,
        seed: int | None = None,
        batch_size: int = 1,
        progress: bool = True,
        **settings,
    ) -> Iterator[Clip]:
        """The clips of `batch`, each as soon as it is there."""
        if isinstance(prompts, str) or not prompts:
            raise SettingsError(f"prompts is {prompts!r}; it must be a list of at least one prompt")
        for name, count in (("num_videos_per_prompt", num_videos_per_prompt), ("batch_size", batch_size)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise SettingsError(f"{name} is {count!r}; it must be a whole number from 1")
        inputs = Inputs.read(**{name: settings.pop(name, None) for name in NAMES})
        settings.setdefault("strength", 0.8)
        first, inputs = planned(Settings(prompts[0], seed=seed, **settings), inputs, self.configs, self.numerics)
        wanted = [prompt for prompt in prompts for _ in range(num_videos_per_prompt)]
        each = [replace(first, prompt=p, seed=first.seed + i) for i, p in enumerate(wanted)]
        each = [one.resolve(self.configs, self.numerics) for one in each]
        for start in range(0, len(each), batch_size):
            yield from self.generate(each[start : start + batch_size], inputs, {}, None, progress)

    @torch.inference_mode()
    def generate(
        self,
        batch: list[Settings],
        inputs: Inputs,
        given: dict[str, Tensor | None],
        callback: OnStepEnd | None,
        progress: bool,
    ) -> list[Clip]:
        """The five steps, for resolved settings that differ in prompt and seed alone."""
        began, settings, parts = time.perf_counter(), batch[0], (self.vae, self.configs, self.numerics)
        text = self.encode_text(batch, given)
        begin = prepare(batch, inputs, given.get("latents"), self.steps(settings.num_inference_steps), *parts)
        latents = self.sample(settings, begin, text, callback, progress)
        frames = self.decode(latents[:, :, settings.surplus_latents(self.configs) :])
        seconds = (time.perf_counter() - began) / len(batch)
        reasons = [name for name, value in {**given, "callback_on_step_end": callback}.items() if value is not None]
        reasons += [] if self.folder else ["model"]
        reasons += [*files_beside(self.transformer, self.vae)]
        described = [self.describe(s, inputs, reasons, len(batch)) for s in batch]
        frames = [inputs.pasted(f) for f in frames]
        return [Clip(f, about["fps"], about, seconds) for f, about in zip(frames, described, strict=True)]

    def encode_text(self, batch: list[Settings], given: dict[str, Tensor | None]) -> Tensor:
        """Embeddings of the prompts, [B, L, D]; with guidance behind those of the negative prompt, [2B, L, D]."""
        settings = batch[0]
        prompted = given.get("prompt_embeds")
        if prompted is None:
            prompted = self.encode_prompts([s.prompt for s in batch])
        prompted = prompted.to(self.device, self.dtype)
        if not settings.is_guided:
            return prompted
        null = given.get("negative_prompt_embeds")
        if null is None and settings.negative_prompt == "" and self.numerics.null_text == "zeros":
            null = torch.zeros_like(prompted[:1])
        elif null is None:
            null = self.encode_prompts([settings.negative_prompt])
        return torch.cat([null.to(prompted).expand_as(prompted), prompted])

    def encode_prompts(self, prompts: list[str]) -> Tensor:  # [B, L, D]
        text = self.text_encoder.encode(prompts)
        check_finite(text, "encoding the prompt", self.text_encoder.model, lambda: self.text_encoder.encode(prompts))
        return text

    def sample(
        self,
        settings: Settings,
        begin: Start,
        text: Tensor,
        callback: OnStepEnd | None,
        progress: bool,
    ) -> Tensor:
        """From the start to scaled latents, [B, C, T, H, W] in fp32."""
        denoise = denoiser(self.transformer, settings, begin, text, self.numerics)
        kept = torch.float32 if self.numerics.latents_between_steps == "fp32" else self.dtype

        def on_step(index: int, timestep: int, frames: Tensor) -> Tensor | None:
            bar.set_postfix_str(f"{peak_memory(frames.device) / 2**30:.2f} GiB peak")
            bar.update()
            latents = frames.transpose(1, 2)
            if begin.kept is not None:
                latents = begin.kept.restore(latents, begin.steps[index].next_alpha)
            replaced = None if callback is None else callback(self, index, timestep, {"latents": latents})
            if replaced is not None and replaced.get("latents") is not None:
                latents = checked("latents of callback_on_step_end", replaced["latents"], latents.shape).to(latents)
            elif begin.kept is None:
                return None
            return latents.transpose(1, 2)

        with tqdm(total=len(begin.steps), unit="step", disable=not progress) as bar:
            frames = begin.noisy.transpose(1, 2)
            frames = SAMPLERS[settings.sampler](denoise, frames, begin.steps, begin.generators, on_step, kept)
            return frames.transpose(1, 2)

    def decode(self, latents: Tensor) -> list[np.ndarray]:
        """Frames of each clip, uint8 [T, H, W, 3], from scaled latents [B, C, T, H, W]."""
        z = (latents.to(self.dtype) / self.configs.vae.scaling_factor).to(next(self.vae.parameters()).dtype)
        plan = decode_chunks(z.shape[2], self.numerics), first_alone(z.shape[2], self.numerics)
        video = self.vae.decode(z, *plan)
        check_finite(video, "decoding", self.vae, lambda: self.vae.decode(z, *plan))
        if z.shape[2] % 2:  # of four frames a latent, the last ones are those of a clip whose first latent gives one
            video = video[:, :, -((z.shape[2] - 1) * self.configs.time_factor + 1) :]
        return list(to_frames(video))

    def check_given(self, settings: Settings, given: dict[str, Tensor | None]) -> None:
        """Raises ValueError for tensors that this model and these settings cannot take."""
        if settings.prompt is None and given["prompt_embeds"] is None:
            raise SettingsError("prompt is None and so is prompt_embeds; give one of them")
        config = self.configs.transformer
        text = (1, self.text_encoder.max_length, config.text_embed_dim)
        shapes = {"prompt_embeds": text, "negative_prompt_embeds": text}
        shapes["latents"] = (1, *settings.latent_shape(self.configs))
        for name, value in given.items():
            if value is not None:
                checked(name, value, shapes[name])

    def describe(self, settings: Settings, inputs: Inputs, reasons: list[str], batch_size: int) -> dict:
        """What the mp4 carries: how the clip was made, and whether that makes it again."""
        return {
            **settings.as_dict(),
            "inputs_sha256": inputs.hashes,
            "fps": inputs.fps or self.configs.fps,
            "batch_size": batch_size,
            "model": self.source,
            "model_sha256": self.model_hash,
            **files_beside(self.transformer, self.vae),
            "numerics": self.numerics.as_dict(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "not_replayable_because_of": reasons,
            "environment": environment(self.device),
        }


def load_part(
    part: type, folder: Path, file: str | os.PathLike | None, config: Published, dtype: Any, device: Any
) -> Any:
    """The transformer or VAE of a folder, or of a single file in its place."""
    beside = {} if file is None else {"config": config}
    return computable(part.from_pretrained(file or folder, dtype=dtype, device=device, **beside), dtype)


def check_folder(folder: Path, configs: Configs, transformer: Any = None, vae: Any = None) -> None:
    """Raises CheckpointError if any part of a checkpoint lacks a tensor or has a wrong one; reads no weights.

    Where a file takes the place of the folder's transformer or VAE, that file is checked.
    """
    load_part(ExpertTransformer, folder, transformer, configs.transformer, torch.float32, "meta")
    load_part(CausalVAE, folder, vae, configs.vae, torch.float32, "meta")
    text_encoder = TextEncoder.from_pretrained(folder, configs.transformer.max_text_seq_length, device="meta")
    width = text_encoder.model.config.d_model
    if width != configs.transformer.text_embed_dim:
        wanted = configs.transformer.text_embed_dim
        raise CheckpointError(f"{folder}: the text encoder is {width} wide, the transformer takes {wanted}")


def checked(name: str, value: object, shape: Sequence[int]) -> Tensor:
    """`value`, if it is a tensor of that shape with finite values. Raises SettingsError otherwise."""
    if not isinstance(value, Tensor):
        raise SettingsError(f"{name} is of type {type(value).__name__}; it must be a tensor")
    if tuple(value.shape) != tuple(shape):
        raise SettingsError(f"{name} has shape {list(value.shape)}; here it must be {list(shape)}")
    if not all_finite(value):
        raise SettingsError(f"{name} holds values that are not finite; it must hold finite numbers alone")
    return value


__all__ = ["NonFiniteError", "Pipeline"]
