"""Text, images and video in, video out, in five visible steps: settings, text, start, sampling, frames."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .clip import Clip, Written
from .data.pixels import to_levels
from .denoise import denoiser
from .diffusion.samplers import SAMPLERS
from .diffusion.schedule import Step, sampling_steps
from .finite import check_finite
from .inputs import NAMES, Inputs, Noise, Picture, Video, checked, planned
from .machine import environment, peak_memory, pick_device
from .memory.choose import warn_of_more
from .memory.load import Files, load_planned
from .memory.placed import Placed
from .memory.plan import Plan
from .models.checkpoint import resolve_folder
from .models.choices import decode_chunks, first_alone, last_norm_eps
from .models.files import files_beside
from .models.saving import content_hash
from .models.text import TextEncoder
from .models.transformer import ExpertTransformer
from .models.vae import CausalVAE
from .numerics import SAT, Numerics, read_numerics
from .parallel.alone import ALONE
from .parts import save_parts
from .settings import Configs, Settings, SettingsError, read_configs
from .speed import Speed
from .start import Start, prepare

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
        plan: Plan | None = None,
        device: torch.device | None = None,  # that a plan is for
        planned_for: Settings | None = None,  # the video that it is for
        speed: Speed | None = None,  # None gives up nothing
    ):
        self.transformer, self.vae, self.text_encoder = transformer.eval(), vae.eval(), text_encoder
        self.configs, self.source, self.folder, self.processes = configs, source, folder, ALONE
        self.numerics, self.placed, self.planned_for = numerics, None, planned_for if plan else None
        if plan is not None:
            parts = {"text_encoder": text_encoder.model, "transformer": self.transformer, "vae": self.vae}
            self.placed = Placed(plan, parts, device or self.device)
        self.speed = speed or Speed()
        self.speed.prepare(self.transformer, self.placed)
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
        memory: str | Plan | None = None,
        planned_for: Settings | None = None,  # resolved
        weights: str | None = None,
        loras: Sequence[tuple[str | os.PathLike, float]] = (),
        speed: Speed | None = None,
    ) -> "Pipeline":
        """Load a published folder, a hub name, or a checkpoint inside this package: "tiny", or "tiny-i2v" for images.

        dtype: None keeps the stored one, except that fp16 is computed in fp32 on a CPU. device: None takes a GPU where
        there is one. numerics: "sat", what the weights were trained with, "diffusers", or the choices one by one, a
        `cogvx.numerics.Numerics`.

        transformer, vae: a safetensors or GGUF file in the place of the folder's. memory: what the device may hold, as
        "8GB", or "auto", what is free there: the fastest plan that makes a video of `planned_for`, or of the model's
        own size, within it (a call for more warns); or a `cogvx.memory.plan.Plan`. weights: "int8" or "fp8", those of
        the text encoder's and the transformer's blocks in 8 bits. loras: files, each with how much it counts. speed:
        what is given up for time. Raises ValueError for what is no checkpoint and where no plan keeps the memory.
        """
        choices, device = read_numerics(numerics), pick_device(device)
        files = Files(resolve_folder(model), read_configs(model), transformer, vae, loras)
        parts, plan, planned_for = load_planned(cls, files, dtype, device, choices, memory, weights, planned_for, speed)
        about = files.configs, os.fspath(model), files.folder, choices, plan
        return cls(*parts, *about, device, planned_for, speed)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the published folder layout, which diffusers loads too."""
        save_parts(folder, self.transformer, self.vae, self.text_encoder, self.configs)

    def release_modulation(self, num_inference_steps: int = 50) -> None:
        """Free the weights that modulate the transformer, a fifth of 2B's, a seventh of 5B's.

        Calls with another number of steps then raise ValueError, and so do saving and training.
        """
        if self.placed is not None:
            raise SettingsError("memory is planned, and the plan moves the weights that modulate; load without it")
        self.transformer.release_modulation([step.timestep for step in self.steps(num_inference_steps)])

    def steps(self, num_inference_steps: int) -> list[Step]:
        """The moves of a sampler under this pipeline's numerics."""
        how = self.numerics
        return sampling_steps(self.configs.schedule, num_inference_steps, how.rounding, how.moves, how.zero_snr)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.transformer.proj_out.weight.device if self.placed is None else self.placed.device

    def at_work(self, part: str) -> AbstractContextManager:
        """While a part computes: its weights are where the plan, if there is one, says."""
        return nullcontext() if self.placed is None else self.placed.at_work(part)

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
        latents: Noise | None = None,  # [1, C, T, H, W], or a file of it: the noise to start from
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
        "windows", or all at once with positions after "riflex". latents: noise in the place of what the seed draws,
        which says the size too where that is unset.

        Raises: SettingsError, a ValueError, that names an argument that does not fit, its value and the nearest valid
        one; NonFiniteError when a computation leaves the finite numbers, with the step and the module.
        """
        settings, inputs = planned(
            Settings(
                prompt, negative_prompt, num_frames, height, width, num_inference_steps, guidance_scale,
                dynamic_guidance, sampler, seed, strength, ofs, longer,
            ),
            Inputs.read(image, last_image, video, mask, latents), self.configs, self.numerics,
        )  # fmt: skip
        given = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
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
        began = time.perf_counter()
        latents = self.make_latents(batch, inputs, given, callback, progress)
        frames = self.decode(latents)
        seconds = (time.perf_counter() - began) / len(batch)
        reasons = [name for name, value in {**given, "callback_on_step_end": callback}.items() if value is not None]
        described = [self.describe(s, inputs, reasons, len(batch)) for s in batch]
        frames = [inputs.pasted(f) for f in frames]
        return [Clip(f, about["fps"], about, seconds) for f, about in zip(frames, described, strict=True)]

    def make_latents(
        self,
        batch: list[Settings],
        inputs: Inputs,
        given: dict[str, Tensor | None],
        callback: OnStepEnd | None,
        progress: bool,
    ) -> Tensor:
        """All but the last step: the scaled latents of the clips, [B, C, T, H, W]."""
        settings, parts = batch[0], (self.vae, self.configs, self.numerics)
        self.processes.agree(batch, inputs)
        self.speed.check(settings, len(batch))
        warn_of_more(self.planned_for, settings, len(batch))
        text = self.encode_text(batch, given)
        with self.at_work("vae"):
            begin = prepare(batch, inputs, self.steps(settings.num_inference_steps), *parts)
        latents = self.sample(settings, begin, text, callback, progress)
        return latents[:, :, settings.surplus_latents(self.configs) :]

    @torch.inference_mode()
    def write(
        self, output: str | os.PathLike, prompt: str, seed: int | None = None, progress: bool = True, **settings
    ) -> Written:
        """Make a video of the prompt and write its frames to an mp4 as they are decoded: no clip is ever held whole.

        The file is the one that `pipeline(...).save(output)` writes. Takes the settings of a single call as keywords
        beside, and raises what that does; where it raises, no file is left.
        """
        began = time.perf_counter()
        self.processes.check_writable(output)
        inputs = Inputs.read(**{name: settings.pop(name, None) for name in NAMES})
        settings.setdefault("strength", 0.8)
        known, inputs = planned(Settings(prompt, seed=seed, **settings), inputs, self.configs, self.numerics)
        latents = self.make_latents([known], inputs, {}, None, progress)
        about, start = self.describe(known, inputs, [], 1), 0

        def parts() -> Iterator[np.ndarray]:
            nonlocal start
            for part in self.decode_each(latents):
                yield inputs.pasted(part[0], start)
                start += len(part[0])

        self.processes.write(output, parts(), about["fps"], about)
        return Written(Path(output), about, time.perf_counter() - began)

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
        encoder = self.text_encoder
        with self.at_work("text_encoder"):
            text = encoder.encode(prompts)
            check_finite(text, "encoding the prompt", encoder.model, lambda: encoder.encode(prompts))
        return text

    def sample(
        self, settings: Settings, begin: Start, text: Tensor, callback: OnStepEnd | None, progress: bool
    ) -> Tensor:
        """From the start to scaled latents, [B, C, T, H, W] in fp32."""
        sequential = self.placed is not None and self.placed.plan.sequential_guidance
        how = self.numerics, sequential, self.processes.sides, self.speed.step_cache
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

        bar = tqdm(total=len(begin.steps), unit="step", disable=not progress)
        with bar, self.at_work("transformer"):
            with self.at_work("modulation"):
                denoise = denoiser(self.transformer, settings, begin, text, *how)
            frames = begin.noisy.transpose(1, 2)
            frames = SAMPLERS[settings.sampler](denoise, frames, begin.steps, begin.generators, on_step, kept)
            return frames.transpose(1, 2)

    def decode(self, latents: Tensor) -> list[np.ndarray]:
        """Frames of each clip, uint8 [T, H, W, 3], from scaled latents [B, C, T, H, W]."""
        return list(np.concatenate(list(self.decode_each(latents)), axis=1))

    def decode_each(self, latents: Tensor) -> Iterator[np.ndarray]:
        """What `decode` gives, chunk by chunk, uint8 [B, t, H, W, 3], each as soon as it is there."""
        return (levels.cpu().numpy() for levels in self.decode_levels(latents))

    @torch.inference_mode()
    def decode_levels(self, latents: Tensor) -> Iterator[Tensor]:
        """The same where the VAE computes."""
        z = (latents.to(self.dtype) / self.configs.vae.scaling_factor).to(next(self.vae.parameters()).dtype)
        alone = first_alone(z.shape[2], self.numerics)
        plan = decode_chunks(z.shape[2], self.numerics), alone
        # Of four frames a latent, the last ones are those of a clip whose first latent gives one.
        surplus = self.configs.time_factor - 1 if z.shape[2] % 2 and not alone else 0
        with self.at_work("vae"):
            for video in self.vae.decode_each(z, *plan):
                check_finite(video, "decoding", self.vae, lambda: deque(self.vae.decode_each(z, *plan), 0))
                yield to_levels(video[:, :, surplus:])
                surplus = 0

    def check_given(self, settings: Settings, given: dict[str, Tensor | None]) -> None:
        """Raises ValueError for tensors that this model and these settings cannot take."""
        if settings.prompt is None and given["prompt_embeds"] is None:
            raise SettingsError("prompt is None and so is prompt_embeds; give one of them")
        config = self.configs.transformer
        text = (1, self.text_encoder.max_length, config.text_embed_dim)
        for name, value in given.items():
            if value is not None:
                checked(name, value, text)

    def describe(self, settings: Settings, inputs: Inputs, reasons: list[str], batch_size: int) -> dict:
        """What the mp4 carries: how the clip was made, and whether that makes it again."""
        reasons = [*reasons, *([] if self.folder else ["model"])]
        vae_dtype = next(self.vae.parameters()).dtype
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
            **({} if vae_dtype == self.dtype else {"vae_dtype": str(vae_dtype).removeprefix("torch.")}),
            **({} if self.placed is None else self.placed.recorded(settings.is_guided, batch_size)),
            **self.processes.recorded(),
            **self.speed.recorded(),
            "not_replayable_because_of": reasons,
            "environment": environment(self.device),
        }
