"""From a video back to the noise that DDIM makes it from, and to the video again.

C latent channels, T latent frames, H W height and width of latents.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .clip import Clip
from .denoise import denoiser
from .diffusion.inversion import ddim_inversion
from .diffusion.schedule import Step
from .inputs import Inputs, Picture, Video, planned
from .pipeline import Pipeline
from .settings import Settings, SettingsError
from .start import Start, image_latents, video_latents


@dataclass(frozen=True, eq=False)
class Inversion:
    """The noise of a video, and with what it was found: the same makes the video again."""

    latents: Tensor  # [1, C, T, H, W] in fp32
    settings: Settings
    inputs: Inputs
    text: Tensor  # [1, L, D], or with guidance [2, L, D]


@torch.inference_mode()
def invert(
    pipeline: Pipeline,
    video: Video,
    prompt: str = "",
    image: Picture | None = None,
    last_image: Picture | None = None,
    negative_prompt: str = "",
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    seed: int = 0,
    ofs: float | None = None,
    refinements: int = 0,
    progress: bool = True,
) -> Inversion:
    """The noise from which DDIM makes the video; without a prompt, as the model sees it unprompted.

    The more steps, or refinements of each, the nearer what is made of it comes to the video; guidance above 1 takes it
    away from that. An image model is shown the video's first frame unless it is given an image.

    Raises SettingsError, a ValueError, that names an argument that does not fit.
    """
    settings = Settings(
        prompt or None, negative_prompt, num_frames, height, width, num_inference_steps, guidance_scale, "constant",
        "ddim", seed, strength=1.0, ofs=ofs,
    )  # fmt: skip
    settings, inputs = planned(settings, Inputs.read(image, last_image, video), pipeline.configs, pipeline.numerics)
    if isinstance(refinements, bool) or not isinstance(refinements, int) or refinements < 0:
        raise SettingsError(f"refinements is {refinements!r}; it must be a whole number from 0")
    if pipeline.speed.step_cache is not None:
        raise SettingsError("step_cache is set; inversion computes every step, load a pipeline without it")
    steps = chained_steps(pipeline, num_inference_steps)
    text = pipeline.encode_text([settings], {"prompt_embeds": None if prompt else pipeline.encode_prompts([""])})
    with pipeline.at_work("vae"):
        begin = clean_start(pipeline, settings, inputs, steps)
    one_by_one = pipeline.placed is not None and pipeline.placed.plan.sequential_guidance
    with pipeline.at_work("transformer"), tqdm(total=len(steps), unit="step", disable=not progress) as bar:
        with pipeline.at_work("modulation"):
            how = pipeline.numerics, one_by_one, pipeline.processes.sides
            denoise = denoiser(pipeline.transformer, settings, begin, text, *how)
        noise = ddim_inversion(
            denoise, begin.noisy.transpose(1, 2), steps, refinements, on_step=lambda *_: bar.update() and None
        ).transpose(1, 2)
    return Inversion(noise, settings, inputs, text)


@torch.inference_mode()
def reconstruct(pipeline: Pipeline, inversion: Inversion, progress: bool = True) -> Clip:
    """The video that DDIM makes of the noise."""
    settings = replace(inversion.settings, strength=None)
    inputs = replace(inversion.inputs, video=None, latents=inversion.latents)
    *null, prompted = inversion.text.split(1)
    embeds = {"prompt_embeds": prompted, "negative_prompt_embeds": null[0] if null else None}
    return pipeline.generate([settings], inputs, embeds, None, progress)[0]


def psnr(clip: Clip, inversion: Inversion) -> float:
    """How near a clip is to the video that was inverted, in dB; infinite for the same pixels."""
    error = np.square(clip.frames.astype(np.float64) - inversion.inputs.video).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def chained_steps(pipeline: Pipeline, num_inference_steps: int) -> list[Step]:
    """The pipeline's steps, each of which must end where the next one begins."""
    steps = pipeline.steps(num_inference_steps)
    ends, begins = [step.next_timestep for step in steps], [*(step.timestep for step in steps[1:]), -1]
    if ends != begins:
        total = pipeline.configs.schedule.num_train_timesteps
        nearest = min((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n - num_inference_steps))
        what = f"it must divide {total}, the nearest is {nearest}; or let moves of numerics be 'visited'"
        raise SettingsError(f"num_inference_steps is {num_inference_steps}; to invert, {what}")
    return steps


def clean_start(pipeline: Pipeline, settings: Settings, inputs: Inputs, steps: list[Step]) -> Start:
    """The video's latents, without noise, and an image model's image latents, drawn as when it is made again."""
    generators, num_latents = [torch.Generator().manual_seed(settings.seed)], settings.latent_shape(pipeline.configs)[1]
    parts = pipeline.vae, pipeline.numerics
    image = image_latents(inputs, num_latents, *parts, generators)
    clip = video_latents(inputs, num_latents, *parts, None)
    return Start(clip, steps, generators, image)
