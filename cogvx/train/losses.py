"""What the VAE is trained on: reconstruction, perceptual distance, KL, and a 3D patch discriminator's opinion.

Videos are [B, 3, T, H, W] in [-1, 1]. With context parallelism a process holds some of the frames; the losses of all
processes then add up to that of the whole clip, and so do their gradients.

Source: "Taming Transformers" (arXiv 2012.09841) for the adversarial part; "CogVideoX" (arXiv 2408.06072), section 2.1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.vae import Posterior
from ..parallel.time_split import WHOLE, TimeSplit

Perceptual = Callable[[Tensor, Tensor], Tensor]  # a distance of two videos, a mean over their frames
MOST = 1e4  # that the adaptive weight may be


@dataclass(frozen=True)
class LossWeights:
    """How much each part counts."""

    l1: float = 1.0
    l2: float = 0.0
    perceptual: float = 0.1  # where a backbone is given
    kl: float = 1e-6  # of the mean over latent values
    adversarial: float = 0.02  # of the ratio of the gradients at the last layer
    adversarial_start: int | None = 0  # the step from which the discriminator counts and learns; None is never

    def is_adversarial(self, step: int) -> bool:
        return self.adversarial_start is not None and step >= self.adversarial_start


def reconstruction_loss(
    output: Tensor, video: Tensor, weights: LossWeights, perceptual: Perceptual | None, row: dict
) -> Tensor:
    """L1 and L2, and the perceptual distance where there is one; PSNR in dB, and that distance, go into `row`."""
    l2 = (output - video).square()
    row["psnr"] = (-10.0 * torch.log10(l2.detach().flatten(1).mean(1) / 4.0)).mean()
    loss = weights.l1 * (output - video).abs().mean() + weights.l2 * l2.mean()
    if perceptual is not None:
        row["perceptual"] = perceptual(output, video)
        loss = loss + weights.perceptual * row["perceptual"]
    return loss


def kl_loss(posterior: Posterior) -> Tensor:
    """Divergence of the posterior from the unit Gaussian, in nats a latent value, a mean over all of them."""
    return posterior.kl().mean() / posterior.mean[0].numel()


def generator_hinge(fake: Tensor) -> Tensor:
    """How well the discriminator is fooled: minus its mean opinion of reconstructions; unbounded on both sides."""
    return -fake.mean()


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """`mean(max(0, 1 - real)) + mean(max(0, 1 + fake))` of opinions on clips and on reconstructions."""
    return F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()


def adaptive_weight(wanted: Tensor, given: Tensor, last: Tensor, split: TimeSplit = WHOLE) -> Tensor:
    """The factor, at most 10,000, that makes the gradient of `given` at the weight `last` as long as `wanted`'s."""
    lengths = []
    for loss in (wanted, given):
        (gradient,) = torch.autograd.grad(loss, last, retain_graph=True)
        lengths.append(split.added(gradient).norm())
    return (lengths[0] / (lengths[1] + 1e-4)).clamp(max=MOST).detach()


def vae_loss(
    output: Tensor,
    video: Tensor,
    posterior: Posterior,
    weights: LossWeights,
    step: int,
    row: dict,
    perceptual: Perceptual | None = None,
    discriminator: nn.Module | None = None,
    last: Tensor | None = None,
    split: TimeSplit = WHOLE,
) -> Tensor:
    """All that the VAE is trained on, as one number; what each part was goes into `row`.

    `last` is the weight of the decoder's last layer, by whose gradients the adversarial part is scaled. The
    discriminator counts from the step `weights.adversarial_start` on; before it, it is not even called.
    """
    loss = split.share_of_frames * reconstruction_loss(output, video, weights, perceptual, row)
    row["kl"] = kl_loss(posterior)
    total = loss + weights.kl * split.share_of_latents * row["kl"]
    if discriminator is not None and weights.is_adversarial(step):
        row["adversarial"] = generator_hinge(discriminator(split.whole(output)))
        fooled = row["adversarial"] / split.size  # every process looks at the whole clip
        total = total + weights.adversarial * adaptive_weight(loss, fooled, last, split) * fooled
    return total


def discriminator_step(
    discriminator: nn.Module,
    optimiser: torch.optim.Optimizer,
    output: Tensor,
    video: Tensor,
    split: TimeSplit = WHOLE,
    may_step: Callable[[float, float], bool] | None = None,
) -> Tensor:
    """One step of the discriminator on clips and their reconstructions; the loss before it.

    may_step: says from the loss and its gradient's norm whether the optimiser steps; None is whenever both are finite.
    """
    real, fake = split.whole(video), split.whole(output.detach())
    loss = discriminator_hinge(discriminator(real), discriminator(fake))
    discriminator.zero_grad()
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in discriminator.parameters() if p.grad is not None]).item()
    if may_step(loss.item(), norm) if may_step is not None else math.isfinite(loss.item() + norm):
        optimiser.step()
    return loss.detach()
