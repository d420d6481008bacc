"""Solving the accountant for one of its inputs: the noise, rounds or cohort that a target epsilon buys."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast

from scipy import optimize

from capsfl.privacy.accounting import LEAST_NOISE, TRUNCATION_COST, account, epsilon, resolve_truncation
from capsfl.privacy.events import PrivacyError, SampledGaussian, Sampler

Unknown = Literal["noise_multiplier", "rounds", "cohort"]

MOST_ROUNDS = 1_000_000
"""Where the search for rounds ends: a budget that lasts longer does not bind."""

_NOISE_TOLERANCE = 1e-4
_MOST_NOISE = 2.0**20


def max_rounds(mechanism: SampledGaussian, *, target_epsilon: float, delta: float) -> int:
    """Returns the most rounds, up to `MOST_ROUNDS`, whose epsilon is at most `target_epsilon`; possibly 0."""
    return largest(lambda rounds: epsilon(mechanism, rounds=rounds, delta=delta) <= target_epsilon, most=MOST_ROUNDS)


def solve(
    target_epsilon: float,
    *,
    for_: Unknown,
    hospitals: int,
    delta: float,
    sampler: Sampler,
    cohort: int | None = None,
    noise_multiplier: float | None = None,
    rounds: int | None = None,
    truncation: int | None = None,
) -> dict[str, Any]:
    """Returns the account of the least noise, the most rounds or the largest cohort within `target_epsilon`.

    The answer never exceeds the target. The noise multiplier is within 0.01 % of the least possible one. A
    Poisson cap left open is chosen last and its cost, at most 0.1 % of epsilon, set aside beforehand.

    Returns:
        `accounting.epsilon_report` of the solution, with `target_epsilon` and `solved_for` added.

    Raises:
        PrivacyError: The unknown is given as well, another value is missing, or no solution exists.
    """
    _check_question(
        target_epsilon,
        for_,
        sampler,
        {"noise_multiplier": noise_multiplier, "rounds": rounds, "cohort": cohort},
    )
    open_cap = sampler == "poisson" and truncation is None
    affordable = target_epsilon / (1 + TRUNCATION_COST) if open_cap else target_epsilon
    # The unknown starts at a value any setting accepts and is replaced at every step of its search.
    if cohort is None:
        cohort = 1 if for_ == "cohort" else hospitals
    multiplier = 1.0 if noise_multiplier is None else noise_multiplier
    mechanism = SampledGaussian(sampler, hospitals, cohort, multiplier, truncation)
    count = 1 if rounds is None else rounds

    def fits_cohort(size: int) -> bool:
        return epsilon(replace(mechanism, cohort=size), rounds=count, delta=delta) <= affordable

    def fits_groups(groups: int) -> bool:
        return fits_cohort(-(-hospitals // groups))

    def excess(multiplier: float) -> float:
        return epsilon(replace(mechanism, noise_multiplier=multiplier), rounds=count, delta=delta) - affordable

    if for_ == "rounds":
        count = max_rounds(mechanism, target_epsilon=affordable, delta=delta)
        if count == 0:
            raise PrivacyError("target_epsilon", target_epsilon, "is exceeded by one round; add noise")
    elif for_ == "cohort" and sampler == "cyclic":
        # The fewer groups the larger they are, and the more often each is visited.
        groups = next((groups for groups in range(1, hospitals + 1) if fits_groups(groups)), None)
        if groups is None:
            raise PrivacyError("target_epsilon", target_epsilon, "is exceeded by a cohort of 1; add noise")
        mechanism = replace(mechanism, cohort=-(-hospitals // groups))
    elif for_ == "cohort":
        size = largest(fits_cohort, most=mechanism.num_slots if sampler == "poisson" else hospitals)
        # Without replacement a full cohort displaces nobody, so its bound can be the lower one.
        size = hospitals if sampler == "fixed" and fits_cohort(hospitals) else size
        if size == 0:
            raise PrivacyError("target_epsilon", target_epsilon, "is exceeded by a cohort of 1; add noise")
        mechanism = replace(mechanism, cohort=size)
    else:
        mechanism = replace(mechanism, noise_multiplier=least_noise(excess, target_epsilon))
    mechanism = resolve_truncation(mechanism, rounds=count, delta=delta)
    report = account(mechanism, rounds=count, delta=delta).to_json()
    return report | {"target_epsilon": target_epsilon, "solved_for": for_}


def _check_question(
    target_epsilon: float, for_: Unknown, sampler: Sampler, values: dict[str, int | float | None]
) -> None:
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise PrivacyError("target_epsilon", target_epsilon, "must be finite and positive")
    for field, value in values.items():
        if field == for_ and value is not None:
            raise PrivacyError(field, value, "is what is solved for; leave it out")
        if field != for_ and field != "cohort" and not value:
            raise PrivacyError(field, value, f"must be above 0 to solve for {for_}")
    if for_ == "cohort" and sampler == "all":
        raise PrivacyError("sampler", sampler, 'has no cohort to choose; use "poisson", "fixed" or "cyclic"')


def largest(fits: Callable[[int], bool], *, most: int) -> int:
    """Returns the largest count in 0..most that fits, where all smaller ones fit too and 0 always does."""
    fitting, step = 0, 1
    while step <= most and fits(step):
        fitting, step = step, 2 * step
    failing = min(step, most + 1)
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if fits(middle) else (fitting, middle)
    return fitting


def least_noise(excess: Callable[[float], float], target_epsilon: float) -> float:
    """Returns a noise multiplier at which `excess`, which falls with it, is not positive but only just."""
    enough = 1.0
    while excess(enough) > 0:
        enough *= 2
        if enough > _MOST_NOISE:
            remedy = f"is out of reach of any noise multiplier up to {_MOST_NOISE:g}"
            raise PrivacyError("target_epsilon", target_epsilon, remedy)
    while enough > LEAST_NOISE and excess(max(enough / 2, LEAST_NOISE)) <= 0:
        enough = max(enough / 2, LEAST_NOISE)
    if enough == LEAST_NOISE:
        return enough
    short = max(enough / 2, LEAST_NOISE)
    root = cast(float, optimize.brentq(excess, short, enough, xtol=_NOISE_TOLERANCE / 2 * short))
    while excess(root) > 0:  # the root is bracketed from either side: step to the one within the target
        root *= 1 + _NOISE_TOLERANCE / 2
    return root
