"""Skips the blocks of a transformer in steps whose input has hardly changed.

B batch, N vision tokens, D width. From one step to the next what the blocks read drifts by the mean of |difference|
over the mean of |it|. While the drifts since they were last computed sum up to less than a threshold, the blocks are
taken to add to the vision tokens what they added then.

Source: "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model" (arXiv 2411.19108), without the
polynomial that it fits to each model.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


class StepCache:
    """The cache of one clip, or of one side of its guidance; `last` makes the next step a computed one."""

    def __init__(self, threshold: float):
        self.threshold, self.last = threshold, False
        self.num_skipped = 0
        self.clear()

    def clear(self) -> None:
        """Forget every step: the next one is computed."""
        self.drift, self.seen, self.added = 0.0, None, None

    def __call__(
        self,
        vision: Tensor,  # [B, N, D], before the blocks
        modulation: Tensor,  # [B, 3, 2, D], of the first norm: shift, scale and gate; of text, then of vision
        blocks: Callable[[], Tensor],  # the vision tokens behind them, [B, N, D]
    ) -> Tensor:
        if self.skips(modulated(vision, modulation)):
            self.num_skipped += 1
            return vision + self.added
        found = blocks()
        self.added = found - vision
        return found

    def skips(self, reads: Tensor) -> bool:
        seen, self.seen = self.seen, reads
        if self.added is None:
            return False
        self.drift += float((reads - seen).abs().mean() / seen.abs().mean())
        if self.last or not self.drift < self.threshold:
            self.drift = 0.0
            return False
        return True


def modulated(vision: Tensor, modulation: Tensor) -> Tensor:
    """What the first block reads, but for the affine part of its norm, whose weights may wait elsewhere."""
    shift, scale = modulation[:, 0, 1, None], modulation[:, 1, 1, None]
    return F.layer_norm(vision, vision.shape[-1:]) * (1 + scale) + shift
