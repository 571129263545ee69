"""Where sampling starts, and what the transformer sees beside the noisy latents: a task's part in latents.

B clips that are made together, C latent channels, T latent frames, H W height and width, of latents unless said.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .data.pixels import to_tensor
from .diffusion.loss import add_noise
from .diffusion.schedule import Step
from .finite import check_finite
from .inputs import Inputs
from .models.choices import encode_chunks, image_scaling
from .models.image_latents import encode_image, in_frames
from .models.vae import CausalVAE, Posterior
from .models.vae import encode_chunks as eights
from .numerics import Numerics
from .settings import Configs, Settings


@dataclass(frozen=True)
class Kept:
    """What stays of a video while the rest is made anew."""

    clip: Tensor  # [B, C, T, H, W], its latents
    noise: Tensor  # [B, C, T, H, W]
    anew: Tensor  # [1, 1, T, H, W], bool

    def restore(self, latents: Tensor, alpha: float) -> Tensor:
        """The latents, outside of what is made anew those of the video, as noisy as all are at this alpha."""
        return torch.where(self.anew, latents, add_noise(self.clip, self.noise, _alphas(alpha)))


@dataclass(frozen=True)
class Start:
    """What sampling begins with."""

    noisy: Tensor  # [B, C, T, H, W] in fp32, as noisy as the first step takes it
    steps: list[Step]
    generators: list[torch.Generator]  # one a clip, for what the sampler draws
    image: Tensor | None = None  # [B, C, T, H, W], which the transformer sees in every step
    kept: Kept | None = None


def prepare(
    batch: list[Settings],  # resolved; they differ in prompt and seed alone
    inputs: Inputs,  # at the size of the settings
    steps: list[Step],
    vae: CausalVAE,
    configs: Configs,
    numerics: Numerics,
) -> Start:
    """The start of each clip. What it draws comes from its seed: images' latents, the video's, then the noise."""
    # Always drawn on the CPU, so that a seed means the same on every device, and frames first, as diffusers does.
    generators = [torch.Generator().manual_seed(s.seed) for s in batch]
    shape, device = batch[0].latent_shape(configs), next(vae.parameters()).device
    image = image_latents(inputs, shape[1], vae, numerics, generators)
    clip = video_latents(inputs, shape[1], vae, numerics, generators)
    noise = torch.cat([draw_noise(shape, g) if inputs.latents is None else inputs.latents for g in generators])
    noise, steps = noise.to(device, torch.float32), steps[-batch[0].num_moves :]
    if clip is None:
        return Start(noise, steps, generators, image)
    anew = None if inputs.mask is None else latent_mask(inputs.mask, *shape[1:]).to(device)
    kept = None if anew is None else Kept(clip, noise, anew)
    return Start(add_noise(clip, noise, _alphas(steps[0].alpha)), steps, generators, image, kept)


def draw_noise(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:  # [1, C, T, H, W]
    channels, num_frames, height, width = shape
    return torch.randn((1, num_frames, channels, height, width), generator=generator).transpose(1, 2)


def image_latents(
    inputs: Inputs, num_latents: int, vae: CausalVAE, numerics: Numerics, generators: list[torch.Generator]
) -> Tensor | None:  # [B, C, T, H, W]
    """The latents of the first image in the first latent frame, of the last image in the last one, zeros elsewhere."""
    if inputs.image is None:
        return None

    def encoded(image: Tensor) -> Tensor:
        scaling = image_scaling(vae.config, numerics)
        latents = encode_image(vae, image.expand(len(generators), -1, -1, -1), scaling, generators)
        check_finite(latents, "encoding the image", vae, lambda: vae.encode(image[:, :, None]))
        return latents

    weight = next(vae.parameters())
    given = {0: inputs.image, -1: inputs.last_image}
    pictures = {at: to_tensor(p[None])[:, :, 0].to(weight) for at, p in given.items() if p is not None}
    return in_frames({at: encoded(picture) for at, picture in pictures.items()}, num_latents)


def video_latents(
    inputs: Inputs, num_latents: int, vae: CausalVAE, numerics: Numerics, generators: list[torch.Generator] | None
) -> Tensor | None:  # [B, C, T, H, W] in fp32; without generators B is 1
    """The scaled latents of the video, the first one repeated in front where `num_latents` is more.

    generators: one a clip, to sample the posterior as all released code does; None takes its mode.
    """
    if inputs.video is None:
        return None
    weight, count = next(vae.parameters()), len(inputs.video)
    lengths = encode_chunks(count, numerics) or eights(count)

    def encoded() -> Posterior:  # a chunk of pixels is a tensor no longer than it is needed
        parts = np.split(inputs.video, np.cumsum(lengths)[:-1])
        return vae.encode_each((to_tensor(part).to(weight) for part in parts), len(parts))

    posterior = encoded()
    check_finite(posterior.mean, "encoding the video", vae, encoded)
    drawn = [posterior.mode()] if generators is None else [posterior.sample(g) for g in generators]
    latents = torch.cat(drawn) * vae.config.scaling_factor
    surplus = num_latents - latents.shape[2]
    return torch.cat([latents[:, :, :1]] * surplus + [latents], dim=2).float()


def latent_mask(mask: np.ndarray, num_latents: int, height: int, width: int) -> Tensor:  # [1, 1, T, H, W], bool
    """Latents any of whose pixels are in a mask [1 or 4k + 1, 8 H, 8 W]; the first frame is a latent frame alone."""
    whole = torch.from_numpy(np.ascontiguousarray(mask)).unflatten(1, (height, -1)).unflatten(3, (width, -1))
    space = whole.any(4).any(2)  # [frames, H, W]
    if len(space) > 1:
        first, others = space[:1], space[1:]
        space = torch.cat([first, others.unflatten(0, (-1, 4)).any(1)])
    # A single mask is that of every frame; in front, latents that only fill up a patch go with the first.
    return torch.cat([space[:1].expand(num_latents - len(space), -1, -1), space])[None, None]


def _alphas(alpha: float) -> Tensor:
    return torch.tensor([alpha], dtype=torch.float64)
