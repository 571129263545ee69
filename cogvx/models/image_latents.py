"""Images as a transformer with image channels sees them: encoded alone, scaled, zeros in every other frame.

B batch, C latent channels, T latent frames, H W height and width. Pictures are [B, 3, H, W] in [-1, 1], latents
[B, C, T, H / 8, W / 8].

Source: "CogVideoX" (arXiv 2408.06072), the official training code and the diffusers library.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..config import VAEConfig
from .vae import CausalVAE, Posterior

# What an image's latent z becomes, f the VAE's scaling_factor. All agree on f z for 5B-I2V. For 1.5-5B-I2V the official
# inference code takes z, its training code f z, the diffusers library z / f; which one the weights saw is unproven.
SCALINGS = ("multiplied", "divided", "unscaled")

SIGMA_LOG_MEAN, SIGMA_LOG_STD = -3.0, 0.5  # of the noise on pictures in training


def default_scaling(config: VAEConfig) -> str:
    """What the diffusers library does with a VAE of this config."""
    return "divided" if config.invert_scale_latents else "multiplied"


def encode_image(
    vae: CausalVAE,
    images: Tensor,  # [B, 3, H, W] in [-1, 1]
    scaling: str,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:  # [B, C, 1, H / 8, W / 8]
    """The scaled latent of each image.

    scaling: one of SCALINGS. generators: one an image, to sample its posterior as in training and in every released
    sampler; None takes the posterior's mode.

    Raises ValueError for images and settings that do not fit.
    """
    check_images(vae.config, images)
    if scaling not in SCALINGS:
        raise ValueError(f"scaling is {scaling!r}; it must be one of {', '.join(SCALINGS)}")
    if generators is not None and len(generators) != len(images):
        raise ValueError(f"generators has {len(generators)} entries for {len(images)} images; give one an image")
    latents = [
        posterior.mode() if generators is None else posterior.sample(generators[i])
        for i, posterior in enumerate(posteriors(vae, images))
    ]
    return scaled(torch.cat(latents), vae.config.scaling_factor, scaling)


def posteriors(vae: CausalVAE, images: Tensor) -> Iterator[Posterior]:  # of [1, C, 1, H / 8, W / 8] each
    """The distribution of latents behind each image [B, 3, H, W]; one by one, so that bits do not depend on B."""
    for image in images.to(next(vae.parameters()).dtype)[:, None]:
        yield vae.encode(image.unsqueeze(2))


def scaled(latents: Tensor, factor: float, scaling: str) -> Tensor:
    if scaling == "unscaled":
        return latents
    return latents * (factor if scaling == "multiplied" else 1 / factor)


def check_images(config: VAEConfig, images: Tensor) -> None:
    unit = 2 ** (len(config.block_out_channels) - 1)
    if images.dim() != 4 or images.shape[1] != config.in_channels or 0 in images.shape:
        wanted = f"[B, {config.in_channels}, H, W]"
        raise ValueError(f"images have shape {list(images.shape)}; it must be {wanted}")
    for name, size in zip(("height", "width"), images.shape[2:], strict=True):
        if size % unit:
            nearest = max(unit, round(size / unit) * unit)
            raise ValueError(f"images have {name} {size}; it must be a multiple of {unit}, the nearest is {nearest}")


def in_frames(
    latents: Mapping[int, Tensor],  # frame: [B, C, 1, H, W]
    num_latents: int,
) -> Tensor:  # [B, C, T, H, W]
    """Image latents at their latent frames, zeros in all others: {0: first}, or {0: first, -1: last}.

    Raises ValueError for a frame that a clip of `num_latents` lacks, or that is given twice.
    """
    first = next(iter(latents.values()))
    clip = first.new_zeros(*first.shape[:2], num_latents, *first.shape[3:])
    taken = set()
    for frame, latent in latents.items():
        if not -num_latents <= frame < num_latents or frame % num_latents in taken:
            what = "is taken already" if frame % num_latents in taken else "is outside the clip"
            raise ValueError(f"latents have frame {frame}, which {what}; it has {num_latents} latent frames")
        taken.add(frame % num_latents)
        clip[:, :, frame] = latent[:, :, 0]
    return clip


def with_image(
    noisy: Tensor,  # [B, C, T, H, W]
    image: Tensor,  # [b, C', T, H, W], b a divisor of B
) -> Tensor:  # [B, C + C', T, H, W]
    """What the transformer takes: noisy latents, then the image's, those repeated for the two halves of guidance.

    Raises ValueError for shapes that do not fit.
    """
    if noisy.shape[2:] != image.shape[2:] or len(noisy) % len(image):
        raise ValueError(f"image has shape {list(image.shape)}, which does not fit latents of {list(noisy.shape)}")
    return torch.cat([noisy, image.to(noisy).repeat(len(noisy) // len(image), 1, 1, 1, 1)], dim=1)


def add_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images as training shows them: with noise of sigma = exp(N(-3, 0.5)) on the pixels, one sigma an image."""
    # Drawn on the generator's device in fp32, so that a seed means the same in every dtype.
    sigmas = torch.exp(SIGMA_LOG_MEAN + SIGMA_LOG_STD * _normal((len(images), 1, 1, 1), generator))
    noise = sigmas * _normal(images.shape, generator)
    return images + noise.to(images)


def drop_image(latents: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Image latents, or zeros for the whole batch with this probability: 0.05 in the official training, else 0."""
    if not 0 <= probability <= 1:
        raise ValueError(f"probability is {probability}; it must be from 0 to 1")
    dropped = torch.rand((), generator=generator, device=generator.device).item() < probability
    return torch.zeros_like(latents) if dropped else latents


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, device=generator.device)
