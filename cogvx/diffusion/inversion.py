"""From finished latents back to the noise that DDIM makes them from.

Source: "Denoising Diffusion Implicit Models" (arXiv 2010.02502), section 4.3; fixed-point refinement as in "AIDI"
(arXiv 2309.04907).
"""

import math
from collections.abc import Sequence

from torch import Tensor

from .samplers import Denoiser, OnStep, after_step, ddim_move, predict_clip
from .schedule import Step


def ddim_inversion(
    denoise: Denoiser,
    latents: Tensor,  # [B, ...] finished
    steps: Sequence[Step],  # of the sampler that is to make them again, noisiest first; they are walked backwards
    refinements: int = 0,
    on_step: OnStep | None = None,
) -> Tensor:
    """The noise from which `ddim` with these steps makes the latents again, the better the more steps there are.

    Each move is made with the clip that the denoiser sees where the move begins, though `ddim` will use the one that it
    sees at its end. Every refinement, one more call of the denoiser a step, solves for the latter. Where the first move
    begins, at the finished clip, no timestep is trained: it is refined once in any case. Guidance far above 1 changes
    the clip from step to step so much that many steps or refinements are needed.

    Raises: ValueError for a number of refinements that is not a whole number from 0.
    """
    if isinstance(refinements, bool) or not isinstance(refinements, int) or refinements < 0:
        raise ValueError(f"refinements must be a whole number from 0, not {refinements!r}")
    x = latents.float()
    for i in reversed(range(len(steps))):
        step, target, finished = steps[i], x, i + 1 == len(steps)
        if not finished:
            x = ddim_move(x, predict_clip(denoise, x, steps[i + 1], i + 1), step.next_alpha, step.alpha)
        # x' = cos x - sin v for the angle between both noise levels, so a miss in x' is a miss of 1 / cos in x.
        cos = math.sqrt(step.alpha * step.next_alpha) + math.sqrt((1 - step.alpha) * (1 - step.next_alpha))
        for _ in range(refinements + finished):
            reached = ddim_move(x, predict_clip(denoise, x, step, i), step.alpha, step.next_alpha)
            x = x + (target - reached) / cos
        x = after_step(on_step, i, step, x)
    return x
