"""What a training step sees, all of it drawn from (seed, step), so that a run goes on exactly where it stopped."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import ScheduleConfig, TransformerConfig
from ..diffusion.loss import add_noise, spread_timesteps
from ..diffusion.schedule import cumulative_alphas
from ..models.image_latents import drop_image, in_frames, scaled
from ..models.packed import Sample


class Example(NamedTuple):
    """A clip as the transformer is trained on it."""

    mean: Tensor  # [C, T, H, W], of its unscaled latents
    std: Tensor
    text: Tensor  # [L, D]
    images: tuple[Tensor, Tensor] | None = None  # of its first frame, K times with other noise: [K, C, H, W] each


class Drawn(NamedTuple):
    """A sample, and what its velocity is to be compared with."""

    sample: Sample  # noisy, and behind it what is seen of an image
    clip: Tensor  # [C, T, H, W], scaled latents
    noise: Tensor
    alpha: Tensor  # []


@dataclass(frozen=True)
class Draws:
    """How examples are drawn: order, posterior, noise, timestep, dropped text, and the image where one is seen."""

    config: TransformerConfig
    schedule: ScheduleConfig
    scaling: float
    null_text: Tensor  # [L, D], what stands in the place of a dropped caption
    drop_text: float
    seed: int
    image_scaling: str = "multiplied"  # of its latents, one of SCALINGS
    drop_image: float = 0.0  # of the samples

    def step(self, examples: Sequence[Example], step: int, count: int) -> list[Drawn]:
        """The samples of a step: `count` examples, the next ones of an order that is another in every epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows = rows_of(self.seed, step * count, count, len(examples))
        timesteps = spread_timesteps(count, self.schedule.num_train_timesteps, generator)
        # Which timestep an example has must not depend on its place in the order.
        timesteps = timesteps[torch.randperm(count, generator=generator)]
        dropped = torch.rand(count, generator=generator) < self.drop_text
        alphas, drawn = cumulative_alphas(self.schedule), []
        for row, timestep, no_text in zip(rows, timesteps.tolist(), dropped.tolist(), strict=True):
            mean, std, text, images = examples[row]
            clip = self.scaling * (mean + std * torch.randn(mean.shape, generator=generator))
            clip = whole_patches(clip, self.config.patch_size_t or 1)
            noise, alpha = torch.randn(clip.shape, generator=generator), alphas[timestep]
            noisy = add_noise(clip[None], noise[None], alpha[None])[0]
            if images is not None:
                noisy = torch.cat([noisy, self.seen(images, clip.shape[1], generator)])
            drawn.append(Drawn(Sample(noisy, self.null_text if no_text else text, timestep), clip, noise, alpha))
        return drawn

    def seen(self, images: tuple[Tensor, Tensor], num_latents: int, generator: torch.Generator) -> Tensor:
        """The image beside a noisy clip, [C, T, H, W]: one of its draws as `placed`, or zeros where it is dropped."""
        mean, std = images
        draw = torch.randint(len(mean), (), generator=generator).item()
        return drop_image(self.placed(mean[draw], std[draw], num_latents, generator), self.drop_image, generator)

    def placed(self, mean: Tensor, std: Tensor, num_latents: int, generator: torch.Generator) -> Tensor:
        """A sample of an image's latents [C, H, W] as a pipeline shows them: scaled, in the first frame, else zeros."""
        latent = mean + std * torch.randn(mean.shape, generator=generator)
        return in_frames({0: scaled(latent, self.scaling, self.image_scaling)[None, :, None]}, num_latents)[0]


def rows_of(seed: int, first: int, count: int, num_examples: int) -> list[int]:
    """Places `first` to `first + count` of the order of all epochs, each of which has every example once."""
    rows: list[int] = []
    while len(rows) < count:
        epoch, at = divmod(first + len(rows), num_examples)
        order = np.random.default_rng((seed, epoch)).permutation(num_examples)
        rows += order[at : at + count - len(rows)].tolist()
    return rows


def whole_patches(clip: Tensor, patch: int) -> Tensor:  # [C, T, H, W]
    """The clip with copies of its first frame in front, where its frames do not fill patches in time."""
    missing = -clip.shape[1] % patch
    return torch.cat([clip[:, :1].expand(-1, missing, -1, -1), clip], dim=1) if missing else clip
