"""How the loss falls with the number of weights and of tokens: a power law, fitted, with its intervals.

    loss(N, D) = least + a / N^alpha + b / D^beta

Source: Hoffmann et al., "Training Compute-Optimal Large Language Models" (arXiv 2203.15556), its third approach.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import least_squares

from .options import TrainingError

_HUBER = 1e-2  # of the logarithm of the loss: a rung further off than a hundredth counts less than its square
NUM_RUNGS = 6  # one more than the law has numbers
SHARE = 0.95  # of the intervals
RESAMPLED = 200  # laws behind an interval


@dataclass(frozen=True)
class Rung:
    """A trained model: the weights of its blocks' products, the tokens it saw, and its loss on clips kept away."""

    weights: int
    tokens: int
    flops: float
    loss: float


@dataclass(frozen=True)
class Law:
    least: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, weights: float, tokens: float) -> float:
        return self.least + self.a * weights**-self.alpha + self.b * tokens**-self.beta

    @property
    def weights_exponent(self) -> float:
        """x in `N ~ C^x`: how the best number of weights grows with the compute C = 6 N D."""
        return self.beta / (self.alpha + self.beta)


def fit(rungs: Sequence[Rung]) -> Law:
    """The law whose logarithm is closest to that of the losses (Huber's measure), the best of a grid of starts.

    Raises TrainingError for too few rungs, or losses that are not finite and above 0.
    """
    if len(rungs) < NUM_RUNGS:
        raise TrainingError(f"{len(rungs)} rungs are given; the law takes at least {NUM_RUNGS}")
    losses = np.array([rung.loss for rung in rungs])
    if not (np.isfinite(losses) & (losses > 0)).all():
        raise TrainingError(f"losses are {losses.tolist()}; every one must be finite and above 0")
    return _fitted(rungs, np.log(losses), _starts(losses))


def resampled(rungs: Sequence[Rung], seed: int = 0) -> list[tuple[Law, float]]:
    """Laws of losses that could have been as well, each with one more error: the fit with its errors dealt out anew.

    An error is of the logarithm, made larger by what five fitted numbers take from it.
    """
    law, random = fit(rungs), np.random.default_rng(seed)
    fitted = np.log([law.loss(rung.weights, rung.tokens) for rung in rungs])
    errors = np.log([rung.loss for rung in rungs]) - fitted
    errors = (errors - errors.mean()) * np.sqrt(len(rungs) / (len(rungs) - 5))
    found = []
    for _ in range(RESAMPLED):
        drawn = fitted + random.choice(errors, len(rungs))
        found.append((_fitted(rungs, drawn, [_to_numbers(law)]), float(random.choice(errors))))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """What the middle 95 % of the values lie between."""
    low, high = np.quantile(values, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


def predicted(rungs: Sequence[Rung], weights: int, tokens: int) -> tuple[float, tuple[float, float]]:
    """The loss of a run that is not among the rungs, and the interval in which it is expected."""
    drawn = [law.loss(weights, tokens) * np.exp(error) for law, error in resampled(rungs)]
    return fit(rungs).loss(weights, tokens), interval(drawn)


def _starts(losses: np.ndarray) -> list[np.ndarray]:
    spread = losses.max() - 0.9 * losses.min()
    shares, exponents = (0.5, 0.9), (0.25, 0.5, 1.0)
    return [
        np.array([np.log(share * losses.min()), np.log(spread) + alpha * 10, alpha, np.log(spread) + beta * 10, beta])
        for share, alpha, beta in product(shares, exponents, exponents)
    ]


def _fitted(rungs: Sequence[Rung], logs: np.ndarray, starts: list[np.ndarray]) -> Law:
    weights = np.log([rung.weights for rung in rungs])
    tokens = np.log([rung.tokens for rung in rungs])

    def errors(numbers: np.ndarray) -> np.ndarray:
        least, a, alpha, b, beta = numbers
        terms = np.stack([np.full_like(weights, least), a - alpha * weights, b - beta * tokens])
        return np.logaddexp.reduce(terms) - logs

    low, high = [-20.0, -20.0, 0.0, -20.0, 0.0], [5.0, 60.0, 3.0, 60.0, 3.0]
    found = [
        least_squares(errors, np.clip(start, low, high), bounds=(low, high), loss="huber", f_scale=_HUBER)
        for start in starts
    ]
    least, a, alpha, b, beta = min(found, key=lambda one: one.cost).x
    return Law(*map(float, (np.exp(least), np.exp(a), alpha, np.exp(b), beta)))


def _to_numbers(law: Law) -> np.ndarray:
    return np.array([np.log(law.least), np.log(law.a), law.alpha, np.log(law.b), law.beta])
