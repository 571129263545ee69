"""Each part of the VAE's loss against a value worked by hand."""

import math

import pytest
import torch

from cogvx.models.vae import Posterior
from cogvx.train.losses import (
    LossWeights,
    adaptive_weight,
    discriminator_hinge,
    discriminator_step,
    generator_hinge,
    kl_loss,
    reconstruction_loss,
    vae_loss,
)

VIDEO = torch.tensor([0.0, 0.5, -0.5, 1.0]).view(1, 1, 1, 2, 2)
OUTPUT = torch.tensor([0.2, 0.5, -0.9, 0.0]).view(1, 1, 1, 2, 2)  # off by 0.2, 0, 0.4, 1
POSTERIOR = Posterior(
    torch.tensor([1.0, 0.0]).view(1, 1, 1, 1, 2), torch.tensor([0.0, math.log(4.0)]).view(1, 1, 1, 1, 2)
)


def test_reconstruction_is_l1_and_l2_and_what_the_backbone_says():
    row: dict = {}
    weights = LossWeights(l1=2.0, l2=3.0, perceptual=0.5)
    loss = reconstruction_loss(OUTPUT, VIDEO, weights, None, row)
    assert loss.item() == pytest.approx(2 * 0.4 + 3 * 0.3)  # means of 0.2 0 0.4 1 and of 0.04 0 0.16 1
    assert row["psnr"].item() == pytest.approx(10 * math.log10(4 / 0.3))
    loss = reconstruction_loss(OUTPUT, VIDEO, weights, lambda output, video: torch.tensor(7.0), row)
    assert loss.item() == pytest.approx(2 * 0.4 + 3 * 0.3 + 0.5 * 7.0)
    assert row["perceptual"] == 7.0


def test_kl_is_a_mean_over_latent_values():
    # mean 1, variance 1: 1/2; mean 0, variance 4: (4 - 1 - log 4) / 2
    assert kl_loss(POSTERIOR).item() == pytest.approx((0.5 + (3 - math.log(4)) / 2) / 2)


def test_hinges():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 2.0])
    assert discriminator_hinge(real, fake).item() == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1 + 3) / 3)
    assert generator_hinge(fake).item() == pytest.approx(1 / 3)


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_lengths():
    last = torch.tensor([3.0, 4.0], requires_grad=True)
    wanted, given = (last * torch.tensor([3.0, 4.0])).sum(), 0.5 * last[0]  # gradients of length 5 and 0.5
    assert adaptive_weight(wanted, given, last).item() == pytest.approx(5 / (0.5 + 1e-4))
    assert adaptive_weight(1e6 * wanted, given * 0 + 0.0 * last.sum(), last).item() == 1e4  # never more
    assert not adaptive_weight(wanted, given, last).requires_grad


class Opinion(torch.nn.Module):
    """Logits a x + b, a number a pixel; counts its calls."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = torch.nn.Parameter(torch.tensor(2.0)), torch.nn.Parameter(torch.tensor(0.5)), 0

    def forward(self, video):
        self.calls += 1
        return self.a * video + self.b


def test_the_whole_loss_and_the_step_at_which_the_discriminator_starts():
    last = torch.tensor(1.0, requires_grad=True)
    weights = LossWeights(l1=1.0, l2=0.0, kl=0.1, adversarial=0.3, adversarial_start=10)
    kl = (0.5 + (3 - math.log(4)) / 2) / 2
    opinion, row = Opinion(), {}
    before = vae_loss(OUTPUT * last, VIDEO, POSTERIOR, weights, 9, row, None, opinion, last)
    assert before.item() == pytest.approx(0.4 + 0.1 * kl) and opinion.calls == 0 and "adversarial" not in row
    after = vae_loss(OUTPUT * last, VIDEO, POSTERIOR, weights, 10, row, None, opinion, last)
    # By last: of L1 the mean of sign(error) output, (0.2 + 0.9 - 0) / 4 where the second has no error; of the
    # opinion -2 mean(output) = 0.1.
    slope, fooled = (0.2 + 0.9) / 4, -(2 * -0.05 + 0.5)
    assert row["adversarial"].item() == pytest.approx(fooled)
    assert after.item() == pytest.approx(0.4 + 0.1 * kl + 0.3 * slope / (0.1 + 1e-4) * fooled, rel=1e-5)
    never = LossWeights(l1=1.0, l2=0.0, kl=0.1, adversarial_start=None)
    assert vae_loss(OUTPUT, VIDEO, POSTERIOR, never, 10**9, {}, None, opinion, last).item() == before.item()


def test_the_discriminator_learns_from_real_and_fake_and_the_generator_not_from_its_step():
    opinion, output = Opinion(), OUTPUT.clone().requires_grad_()
    optimiser = torch.optim.SGD(opinion.parameters(), lr=0.1)
    loss = discriminator_step(opinion, optimiser, output, VIDEO)
    # real: 2 x + 0.5 = 0.5 1.5 -0.5 2.5 -> 0.5 0 1.5 0; fake: 0.9 1.5 -1.3 0.5 -> 1.9 2.5 0 1.5
    assert loss.item() == pytest.approx(0.5 + 5.9 / 4)
    # d/da: real -(0 - 0.5) / 4, fake (0.2 + 0.5 + 0) / 4; d/db: real -2 / 4, fake 3 / 4
    assert opinion.a.item() == pytest.approx(2 - 0.1 * (0.5 + 0.7) / 4)
    assert opinion.b.item() == pytest.approx(0.5 - 0.1 * 0.25)
    assert output.grad is None


def test_the_discriminator_does_not_step_on_what_is_not_finite_or_not_allowed():
    opinion, asked = Opinion(), []
    optimiser = torch.optim.SGD(opinion.parameters(), lr=0.1)
    discriminator_step(opinion, optimiser, OUTPUT * float("nan"), VIDEO)
    loss = discriminator_step(opinion, optimiser, OUTPUT, VIDEO, may_step=lambda *given: asked.append(given))
    assert (opinion.a.item(), opinion.b.item()) == (2.0, 0.5)
    # The gradients are those of the test above: 0.3 and 0.25.
    assert asked == [(loss.item(), pytest.approx(math.hypot((0.5 + 0.7) / 4, 0.25)))]
