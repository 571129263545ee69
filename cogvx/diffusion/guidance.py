"""Classifier-free guidance, and how strong it is at each step.

Source: "Classifier-Free Diffusion Guidance" (arXiv 2207.12598); the dynamic forms are those of the released samplers.
"""

import math
from collections.abc import Callable

from torch import Tensor


def guide(
    null: Tensor,  # [B, C, T, H, W], predicted without the prompt
    prompted: Tensor,  # [B, C, T, H, W], predicted with it
    scale: float,
) -> Tensor:
    """Push the prediction away from the unprompted one: `null + scale * (prompted - null)`; 1.0 is no push."""
    return null + scale * (prompted - null)


def constant(scale: float, timestep: int, step_index: int, num_steps: int) -> float:
    """The same scale at every step."""
    return scale


def wave(scale: float, timestep: int, step_index: int, num_steps: int) -> float:
    """Dynamic guidance as it was released: the timestep (0 ... 999) stands where a step index was meant.

    The scale jumps up and down between 1 and 1 + scale. The authors keep it on purpose: checkpoints are judged with it.
    """
    return 1 + scale * (1 - math.cos(math.pi * ((num_steps - timestep) / num_steps) ** 5)) / 2


def cosine(scale: float, timestep: int, step_index: int, num_steps: int) -> float:
    """Dynamic guidance as it was meant: 1 for the first half of the steps, then a rise to almost 1 + scale."""
    return 1 + scale * (1 - math.cos(math.pi * (step_index / num_steps) ** 5)) / 2


# The scale of one step from (scale, timestep, step index, number of steps).
SCALES: dict[str, Callable[[float, int, int, int], float]] = {"constant": constant, "wave": wave, "cosine": cosine}


class Together:
    """Both sides of guidance are predicted here; in `cogvx.parallel.sides` they are apart."""

    def own(self, x: Tensor) -> Tensor:
        """Of [2B, ...], without the prompt and with it, what is computed here."""
        return x

    def both(self, x: Tensor) -> Tensor:
        """What was predicted here, with what was elsewhere, [2B, ...]."""
        return x


TOGETHER = Together()
