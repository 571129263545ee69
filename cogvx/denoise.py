"""The transformer as samplers call it: under guidance, an image beside the latents, all of it watched to stay finite.

B clips, C latent channels, T latent frames, H W height and width of latents. Samplers see frames first,
[B, T, C, H, W], so that the noise they add is that of diffusers too, seed for seed.
"""

import torch
from torch import Tensor

from .config import TransformerConfig
from .diffusion.guidance import TOGETHER, Together, guide
from .diffusion.samplers import Denoiser
from .diffusion.windows import windowed
from .finite import check_finite
from .models.choices import placement
from .models.fp16 import overflowed
from .models.image_latents import with_image
from .models.step_cache import StepCache
from .models.transformer import ExpertTransformer
from .numerics import Numerics
from .settings import Settings
from .start import Start


def denoiser(
    transformer: ExpertTransformer,
    settings: Settings,
    begin: Start,
    text: Tensor,  # [B, L, D]; with guidance [2B, L, D], those of the negative prompt first
    numerics: Numerics,
    sequential: bool = False,
    sides: Together = TOGETHER,
    step_cache: float | None = None,
) -> Denoiser:
    """(latents [B, T, C, H, W], timestep, index of the step) to the guided velocity, in fp32.

    Clips longer than trained are seen in windows that overlap by half, where the settings say so; in all but the first
    an image model sees no first image, as when it was dropped in training. sequential: clips and the two sides of
    guidance pass one after another, which takes less memory. step_cache: see `Speed`; the last step is computed always.
    sides: where each side of guidance is predicted.

    Raises NumericsError for a size that these numerics have no positions for.
    """
    guided, steps, dtype = len(text) > len(begin.noisy), begin.steps, transformer.proj_out.weight.dtype
    text = sides.own(text)
    table = transformer.tabulate(
        [step.timestep for step in steps], batch=1 if sequential else len(text), ofs=settings.ofs
    )
    length, (num_latents, *size) = window_length(transformer.config), begin.noisy.shape[2:]
    in_windows = settings.longer == "windows" and num_latents > length
    grid = (length if in_windows else num_latents, *size)
    places = placement(transformer.config, numerics, grid, settings.longer == "riflex")

    # Once fp16 has overflowed, the rest of a clip is computed with care; the next one begins anew, as it would alone.
    careful = dtype == torch.float16 and not transformer.fits_fp16()
    caches = [None if step_cache is None else StepCache(step_cache) for _ in (text if sequential else [text])]

    def denoise_view(frames: Tensor, timestep: int, index: int) -> Tensor:
        nonlocal careful
        x = sides.own(torch.cat([frames, frames]) if guided else frames).transpose(1, 2)
        inputs = x.to(dtype), text, torch.full((len(x),), timestep, device=x.device)
        how = {"ofs": settings.ofs, "placement": places}
        passes = list(zip(*(part.split(1) for part in inputs), strict=True)) if sequential else [inputs]

        for cache in filter(None, caches):
            cache.last = index == len(steps) - 1

        def predicted() -> Tensor:
            made = [
                transformer(*one, table.at(timestep), **how, careful=careful, cache=cache)
                for one, cache in zip(passes, caches, strict=True)
            ]
            return sides.both(torch.cat(made) if sequential else made[0])

        v = predicted()
        if overflowed(v):
            careful = True
            for cache in filter(None, caches):
                cache.clear()
            v = predicted()
        v = v.float().transpose(1, 2)
        where = f"step {index + 1} of {len(steps)}"
        check_finite(v, where, transformer, lambda: transformer(*inputs, **how, careful=careful))
        return guide(*v.chunk(2), settings.scale_at(timestep, index)) if guided else v

    view = windowed(denoise_view, length, length // 2, dim=1) if in_windows else denoise_view

    def denoise(frames: Tensor, timestep: int, index: int) -> Tensor:
        x = frames if begin.image is None else with_image(frames.transpose(1, 2), begin.image).transpose(1, 2)
        return view(x, timestep, index)

    return denoise


def window_length(config: TransformerConfig) -> int:
    """Latent frames of a window, as many as the model was trained on, in whole patches."""
    return config.trained_grid[0] * config.patch[0]
