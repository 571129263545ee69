"""The transformer as samplers call it: under guidance, an image beside the latents, all of it watched to stay finite.

B clips, C latent channels, T latent frames, H W height and width of latents. Samplers see frames first,
[B, T, C, H, W], so that the noise they add is that of diffusers too, seed for seed.
"""

import torch
from torch import Tensor

from .diffusion.guidance import guide
from .diffusion.samplers import Denoiser
from .finite import check_finite
from .models.choices import placement
from .models.image_latents import with_image
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
) -> Denoiser:
    """(latents [B, T, C, H, W], timestep, index of the step) to the guided velocity, in fp32.

    Raises NumericsError for a size that these numerics have no positions for.
    """
    guided, steps, dtype = len(text) > len(begin.noisy), begin.steps, transformer.proj_out.weight.dtype
    table = transformer.tabulate([step.timestep for step in steps], batch=len(text), ofs=settings.ofs)
    places = placement(transformer.config, numerics, begin.noisy.shape[2:])

    def denoise(frames: Tensor, timestep: int, index: int) -> Tensor:
        x = (torch.cat([frames, frames]) if guided else frames).transpose(1, 2)
        x = x if begin.image is None else with_image(x, begin.image)
        inputs = x.to(dtype), text, torch.full((len(x),), timestep, device=x.device)
        v = transformer(*inputs, table.at(timestep), placement=places).float().transpose(1, 2)
        where = f"step {index + 1} of {len(steps)}"
        check_finite(v, where, transformer, lambda: transformer(*inputs, ofs=settings.ofs, placement=places))
        return guide(*v.chunk(2), settings.scale_at(timestep, index)) if guided else v

    return denoise
