"""The audit's bound is the theorem's: brute force, closed forms, coverage, and another library's figure."""

import math

import numpy as np
import pytest

from capsfl.privacy.events import PrivacyError
from capsfl.privacy.lower_bound import epsilon_ceiling, epsilon_lower_bound, p_value


def brute_force(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [math.comb(guesses, k) * chance**k * (1 - chance) ** (guesses - k) for k in range(guesses + 1)]
    alpha = max((math.fsum(mass[right - i : right]) / i for i in range(1, right + 1)), default=0.0)
    return min(1.0, math.fsum(mass[right:]) + 2 * canaries * delta * alpha)


@pytest.mark.parametrize("guesses", [1, 7, 40])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0, 6.0])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-2])
def test_the_tail_is_the_sum_over_all_outcomes(guesses, epsilon, delta):
    for right in range(guesses + 1):
        found = p_value(right=right, guesses=guesses, canaries=50, epsilon=epsilon, delta=delta)
        assert found == pytest.approx(brute_force(right, guesses, 50, epsilon, delta), rel=1e-9)


@pytest.mark.parametrize("guesses", [10, 100, 1000])
def test_without_a_wrong_guess_at_delta_0_the_bound_has_a_closed_form(guesses):
    chance = 0.05 ** (1 / guesses)
    bound = epsilon_ceiling(guesses=guesses, canaries=guesses, delta=0.0, confidence=0.95)
    assert bound == pytest.approx(math.log(chance / (1 - chance)), abs=2e-6)
    assert bound == pytest.approx(math.log(guesses / 3), abs=0.2 if guesses == 10 else 0.02)


def test_guesses_no_better_than_a_coin_prove_nothing():
    assert epsilon_lower_bound(right=500, guesses=1000, canaries=1000, delta=1e-5, confidence=0.95) == 0.0


def test_more_right_guesses_prove_more_and_more_delta_less():
    def bound(right: int, delta: float) -> float:
        return epsilon_lower_bound(right=right, guesses=200, canaries=1000, delta=delta, confidence=0.95)

    by_right = [bound(right, 1e-5) for right in range(130, 201, 10)]
    assert by_right == sorted(by_right)
    assert by_right[0] > 0
    by_delta = [bound(195, delta) for delta in (0.0, 1e-6, 1e-5, 1e-4)]
    assert by_delta == sorted(by_delta, reverse=True)
    assert by_delta[0] > by_delta[-1]


def test_the_bound_is_wrong_no_more_often_than_it_says():
    # Randomized response is the mechanism for which the theorem is tight at delta 0.
    draws = np.random.default_rng(0).binomial(300, 1 / (1 + math.exp(-1.0)), size=2000)
    bounds = {
        right: epsilon_lower_bound(right=int(right), guesses=300, canaries=300, delta=0.0, confidence=0.9)
        for right in set(draws.tolist())
    }
    wrong = np.mean([bounds[right] > 1.0 for right in draws.tolist()])
    assert 0.06 < wrong <= 0.12  # 0.1 less the lattice of counts, and three standard deviations


@pytest.mark.parametrize(("right", "guesses"), [(95, 100), (380, 400), (700, 1000)])
def test_jax_privacy_finds_the_same_bound(right, guesses):
    auditing = pytest.importorskip("jax_privacy.auditing")
    # Its interface scores canaries; here "in" stands for a right guess, and the passed over ones score low.
    high, low = np.ones(right), np.ones(guesses - right)
    auditor = auditing.CanaryScoreAuditor(high, np.concatenate([low, np.zeros(1000 - guesses)]))
    theirs = auditor.epsilon_one_run(0.05, 1e-5, threshold_strategy=auditing.Explicit(0.5))
    ours = epsilon_lower_bound(right=right, guesses=guesses, canaries=1000, delta=1e-5, confidence=0.95)
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("guesses", {"guesses": 11}),
        ("right", {"right": 6}),
        ("delta", {"delta": 1.0}),
        ("delta", {"delta": math.nan}),
        ("confidence", {"confidence": 1.0}),
    ],
)
def test_values_out_of_range_are_named(field, values):
    good = {"right": 5, "guesses": 5, "canaries": 10, "delta": 0.0, "confidence": 0.9}
    with pytest.raises(PrivacyError, match=f"^{field} = "):
        epsilon_lower_bound(**(good | values))
