"""Muon for the matrices that do the work, AdamW for everything else."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..machine import multiplies_bf16


class Muon(torch.optim.Optimizer):
    """Each gradient matrix is turned into its nearest orthogonal one before the step, with Nesterov's momentum.

    `torch.optim.Muon` does so in bf16 alone, which takes a minute a step of a small model where a CPU has no
    instructions for it; there this one computes in fp32.

    Source: K. Jordan et al., "Muon: an optimizer for hidden layers" (2024).
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state, share = self.state[weight], group["momentum"]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                mean = state["momentum_buffer"].lerp_(weight.grad, 1 - share)
                rows, columns = weight.shape
                step = orthogonal(weight.grad.lerp(mean, share))
                weight.add_(step, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonal(matrix: Tensor, num_iterations: int = 5) -> Tensor:
    """The matrix [R, C] with its singular values brought near 1 (0.7 to 1.2), by a quintic Newton-Schulz iteration."""
    narrow = matrix.is_cuda or multiplies_bf16()
    x = matrix.to(torch.bfloat16 if narrow else torch.float32)
    x = x.T if len(matrix) > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(num_iterations):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype)


class MuonAdamW:
    """Two optimisers as one: Muon for some weights, AdamW for the others.

    A convolution's weight counts as the matrix [C_out, C * taps]. On the small causal VAE this needs well under half
    of AdamW's steps for the same error.
    """

    def __init__(self, matrices: list[Tensor], others: list[Tensor], muon_lr: float, adamw_lr: float):
        self.matrices = matrices
        self.views = [weight.detach().flatten(1) for weight in matrices]  # they share the weights' memory
        self.muon = Muon(self.views, muon_lr) if matrices else None
        self.adamw = torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4)
        self.both = [(self.adamw, adamw_lr), *([(self.muon, muon_lr)] if matrices else [])]

    def step(self, share: float) -> None:
        """One step at `share` of the full learning rates."""
        for optimiser, lr in self.both:
            for group in optimiser.param_groups:
                group["lr"] = lr * share
        for view, weight in zip(self.views, self.matrices, strict=True):
            view.grad = None if weight.grad is None else weight.grad.flatten(1)
        for optimiser, _ in self.both:
            optimiser.step()

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self._parts()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self._parts():
            part.load_state_dict(state[name])

    def _parts(self) -> list[tuple[str, torch.optim.Optimizer]]:
        return [(name, part) for name, part in (("muon", self.muon), ("adamw", self.adamw)) if part is not None]


def adamw(weights: Iterable[nn.Parameter], rates: Any) -> torch.optim.Optimizer:
    """AdamW by the options of a run, in one pass over weights and states: without copies of all of them beside.

    rates: with `bits` 8 the moments are quantised, which torchao does.
    """
    if rates.bits == 8:
        from .eight_bits import AdamW8  # only now: torchao is no requirement

        return AdamW8(weights, rates.lr, rates.betas, rates.eps, rates.weight_decay)
    return torch.optim.AdamW(weights, rates.lr, rates.betas, rates.eps, rates.weight_decay, fused=True)


def clip_gradients(weights: Iterable[nn.Parameter], most: float) -> float:
    """Scale gradients down where their norm, over all weights and all processes' slices, is above `most`; that norm."""
    weights = list(weights)
    norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    nn.utils.clip_grads_with_norm_(weights, most, norm)
    return norm.item()


def state_name(rates: Any) -> str:
    """What `adamw`'s state is called on disk: moments of 8 and of 32 bits do not stand in for each other."""
    return "optimiser" if rates.bits == 32 else f"optimiser_{rates.bits}bit"


def set_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def muon_adamw(model: nn.Module, muon_lr: float, adamw_lr: float, adamw_names: tuple[str, ...]) -> MuonAdamW:
    """Muon for every weight with at least two axes, but for those whose name holds one of `adamw_names`.

    A muon_lr of 0 leaves all to AdamW.
    """
    matrices, others = [], []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        hidden = muon_lr > 0 and weight.ndim >= 2 and not any(part in name for part in adamw_names)
        (matrices if hidden else others).append(weight)
    return MuonAdamW(matrices, others, muon_lr, adamw_lr)


def warmup_hold_decay(step: int, num_steps: int, num_warmup: int, num_decay: int) -> float:
    """Share of the full learning rate at `step`: a linear rise, a plateau, a linear fall to zero."""
    return min(1.0, (step + 1) / num_warmup, (num_steps - step) / num_decay)


def cosine(step: int, num_steps: int, num_warmup: int, least: float = 0.0) -> float:
    """Share of the full learning rate at `step`: a linear rise, then half a cosine down to `least` at the end."""
    if step < num_warmup:
        return (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
