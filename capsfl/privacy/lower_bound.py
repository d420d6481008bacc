"""What right guesses about canaries prove: a lower bound on epsilon from one run.

Theorem 5.2 of Steinke, Nasr and Jagielski, "Privacy auditing with one (1) training run" (2023, arXiv:2305.08846).
Our own lines and not those of `jax_privacy.auditing` (2.0.0): that bound knows only guesses of "included"
(k_- = 0), refuses delta = 0, and cannot take a run without a wrong guess, which is what its ceiling is made of.
"""

import numpy as np
from scipy.special import expit
from scipy.stats import binom

from capsfl.privacy.events import PrivacyError

TOLERANCE = 1e-6
"""How closely epsilon is found; the returned end of the interval is the one that is still rejected."""


def p_value(*, right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Returns the greatest chance an (epsilon, delta) mechanism has of this many right guesses.

        P[right guesses >= v] <= beta + 2 n delta alpha,   W ~ Binomial(r, e^eps / (1 + e^eps)),
        beta = P[W >= v],   alpha = max over i in 1 .. v of P[v - i <= W < v] / i

    Guarantee: holds for hospital-level privacy under adding or removing one, every canary being included by an
    independent fair coin, and the r guesses being chosen from the released models in any way, r fixed before.

    Args:
        right: v, how many guesses were right.
        guesses: r, canaries whose coin was guessed; the others were passed over.
        canaries: n, all of them, guessed or not.
        epsilon: The claim, at least 0.
        delta: The claim's delta.

    Raises:
        PrivacyError: A count or a claim is out of range.
    """
    if not 1 <= guesses <= canaries:
        raise PrivacyError("guesses", guesses, f"must lie between 1 and the number of canaries ({canaries})")
    if not 0 <= right <= guesses:
        raise PrivacyError("right", right, f"must lie between 0 and the number of guesses ({guesses})")
    if not epsilon >= 0:
        raise PrivacyError("epsilon", epsilon, "must be a number and not negative")
    if not 0 <= delta < 1:
        raise PrivacyError("delta", delta, "must lie between 0 and 1, 1 excluded")
    chance = expit(epsilon)
    beta = float(binom.sf(right - 1, guesses, chance))
    steps = np.arange(1, right + 1)
    # Summed from the probabilities themselves: differences of tails would lose the small ones.
    below = np.cumsum(binom.pmf(right - steps, guesses, chance))
    alpha = float(np.max(below / steps, initial=0.0))
    return min(1.0, beta + 2 * canaries * delta * alpha)


def epsilon_lower_bound(*, right: int, guesses: int, canaries: int, delta: float, confidence: float) -> float:
    """Returns an epsilon that the mechanism exceeds with the given confidence; 0 when nothing is shown.

    An (epsilon, delta) guarantee also holds for every larger epsilon, so each rejected one is a lower bound.

    Args:
        right: v, how many guesses were right.
        guesses: r, fixed before the scores were seen.
        canaries: n.
        delta: The delta at which epsilon is bounded.
        confidence: Chance that the bound is true, for example 0.95.

    Raises:
        PrivacyError: A value is out of range.
    """
    if not 0 < confidence < 1:
        raise PrivacyError("confidence", confidence, "must lie between 0 and 1, both excluded")

    def rejected(epsilon: float) -> bool:
        chance = p_value(right=right, guesses=guesses, canaries=canaries, epsilon=epsilon, delta=delta)
        return chance <= 1 - confidence

    if not rejected(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while rejected(high):
        low, high = high, 2 * high
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def epsilon_ceiling(*, guesses: int, canaries: int, delta: float, confidence: float) -> float:
    """Returns the most an audit can show, every guess being right: about ln(r / 3) at 95 % and delta 0."""
    return epsilon_lower_bound(right=guesses, guesses=guesses, canaries=canaries, delta=delta, confidence=confidence)
