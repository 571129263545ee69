import numpy as np
import pytest

from cogvx.train.options import TrainingError
from cogvx.train.scaling import Law, Rung, fit, interval, predicted, resampled

TRUE = Law(least=0.05, a=40.0, alpha=0.6, b=300.0, beta=0.7)


def rungs_of(law: Law, error: float = 0.0) -> list[Rung]:
    random = np.random.default_rng(0)
    return [
        Rung(n, d, 6.0 * n * d, law.loss(n, d) * float(np.exp(error * random.standard_normal())))
        for n in (24_000, 55_000, 147_000, 330_000, 786_000) for d in (180_000, 570_000, 1_800_000)
    ]  # fmt: skip


def test_a_law_is_found_again():
    law = fit(rungs_of(TRUE))
    for name in ("least", "alpha", "beta", "weights_exponent"):
        assert getattr(law, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name
    assert TRUE.weights_exponent == pytest.approx(0.7 / 1.3)


def test_a_run_that_was_not_made_is_predicted_within_an_interval_that_errors_widen():
    *others, last = rungs_of(TRUE)
    loss, (low, high) = predicted(others, last.weights, last.tokens)
    assert loss == pytest.approx(last.loss, rel=1e-3) and low <= loss <= high
    noisy = rungs_of(TRUE, error=0.02)[:-1]
    _, (lower, higher) = predicted(noisy, last.weights, last.tokens)
    assert lower < last.loss < higher and higher - lower > 10 * (high - low)


def test_intervals_hold_the_true_exponents():
    laws = [law for law, _ in resampled(rungs_of(TRUE, error=0.01))]
    for name in ("alpha", "beta"):
        low, high = interval([getattr(law, name) for law in laws])
        assert low < getattr(TRUE, name) < high and high - low > 0.01, name


def test_too_few_rungs_and_losses_of_no_use_are_refused():
    with pytest.raises(TrainingError, match="5 rungs are given; the law takes at least 6"):
        fit(rungs_of(TRUE)[:5])
    with pytest.raises(TrainingError, match="finite and above 0"):
        fit([*rungs_of(TRUE), Rung(1000, 1000, 6e6, float("nan"))])
