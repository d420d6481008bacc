"""What T rounds cost one hospital, by dp-accounting: this module only picks the event and the accountant.

| sampler   | neighbours        | headline                                   | beside it                     |
|-----------|-------------------|--------------------------------------------|-------------------------------|
| `poisson` | add or remove one | PLD of the truncated Poisson event         | RDP of the untruncated event  |
| `fixed`   | replace one       | PLD, sampling probability 1 truncated at m | RDP, no replacement, at z/2   |
| `all`     | add or remove one | exact Gaussian composition                 | the same, for replacing one   |
| `cyclic`  | add or remove one | the same over ceil(T / groups) rounds      | the same, for replacing one   |

The unit is the hospital: its whole contribution to a round, clipped to norm S. The bounds hold in real
arithmetic; the noise itself is drawn in float32. `cyclic` samples nothing, so no amplification is claimed: a hospital
has its group whether or not the others are there, and pays for the rounds of its group alone.

Sources: PLD, Koskela et al. 2020 and Doroshenko et al. 2022 (connect the dots); truncated Poisson sampling,
Ganesh 2025 (arXiv:2508.15089); exact Gaussian, Balle and Wang 2018; RDP, Mironov 2017 and, without
replacement, Wang, Balle and Kasiviswanathan 2019.
"""

import functools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Literal

import dp_accounting
import numpy as np
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant

from capsfl.privacy.events import PrivacyError, Relation, SampledGaussian, Sampler

SMALLEST_DELTA = 1e-10
"""Below this the FFT behind the PLD accountant no longer resolves delta."""

LEAST_NOISE = 1e-3
"""Below this noise multiplier epsilon is beyond 10^5, the PLD overflows, and we report it as unbounded."""

TRUNCATION_COST = 1e-3
"""An automatic cap may raise epsilon by at most this fraction."""

MEANINGFUL_EPSILON = 10
"""Above this an epsilon is reported with the remark that it protects nobody."""

LIBRARY = f"dp-accounting {version('dp-accounting')}"
"""Whose accountant it is."""

_ACCOUNTANTS = {
    "poisson": "PLD of the truncated Poisson-subsampled Gaussian",
    "fixed": "PLD of the Gaussian without replacement (truncated event, sampling probability 1)",
    "all": "exact Gaussian composition",
    "cyclic": "exact Gaussian composition over the rounds of a hospital's group",
}
_ACCOUNTANTS_BESIDE = {
    "poisson": "RDP of the untruncated Poisson-subsampled Gaussian",
    "fixed": "RDP of the Gaussian without replacement, noise multiplier halved",
    "all": "exact Gaussian composition",
    "cyclic": "exact Gaussian composition over the rounds of a hospital's group",
}
_GAUSSIAN = ("all", "cyclic")
_NEIGHBOURS = {
    "add_or_remove_one": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}


@dataclass(frozen=True, kw_only=True)
class Account:
    """An epsilon with everything needed to read and to recompute it; None means unbounded."""

    epsilon: float | None
    delta: float
    relation: Relation
    unit: Literal["hospital", "patient"] = "hospital"
    accountant: str
    library: str
    sampler: Sampler
    hospitals: int
    cohort: int
    truncation: int | None
    noise_multiplier: float
    rounds: int
    beside_epsilon: float | None
    beside_relation: Relation
    beside_accountant: str
    remark: str

    def to_json(self) -> dict[str, Any]:
        """Returns the account as a flat dictionary of JSON scalars."""
        return asdict(self)


def account(mechanism: SampledGaussian, *, rounds: int, delta: float) -> Account:
    """Returns the headline epsilon of `rounds` rounds, the second figure beside it, and their labels."""
    headline = epsilon(mechanism, rounds=rounds, delta=delta)
    return Account(
        epsilon=finite(headline),
        delta=delta,
        relation=mechanism.relation,
        accountant=_ACCOUNTANTS[mechanism.sampler],
        library=LIBRARY,
        **asdict(mechanism),
        rounds=rounds,
        beside_epsilon=finite(beside_epsilon(mechanism, rounds=rounds, delta=delta)),
        beside_relation="replace_one" if mechanism.sampler in _GAUSSIAN else mechanism.relation,
        beside_accountant=_ACCOUNTANTS_BESIDE[mechanism.sampler],
        remark=_remark(mechanism, headline, delta),
    )


def epsilon_report(
    *,
    hospitals: int,
    cohort: int | None,
    noise_multiplier: float,
    rounds: int,
    delta: float,
    sampler: Sampler,
    truncation: int | None = None,
) -> dict[str, Any]:
    """Returns what `rounds` rounds cost one hospital, as flat JSON with relation, unit, accountant and delta.

    A `cohort` of None takes all hospitals; a Poisson `truncation` of None takes the smallest cap that costs
    less than 0.1 % of epsilon.

    Raises:
        PrivacyError: A value is out of range or contradicts another.
    """
    check_budget(rounds=rounds, delta=delta)
    cohort = hospitals if cohort is None else cohort
    mechanism = SampledGaussian(sampler, hospitals, cohort, noise_multiplier, truncation)
    mechanism = resolve_truncation(mechanism, rounds=rounds, delta=delta)
    return account(mechanism, rounds=rounds, delta=delta).to_json()


@lru_cache(maxsize=4096)
def epsilon(mechanism: SampledGaussian, *, rounds: int, delta: float) -> float:
    """Returns the epsilon of `rounds` rounds at `delta`: hospital-level, under `mechanism.relation`.

    An upper bound: the grid of the PLD raises it by about 3e-5, never lowers it. Infinite for noise
    below `LEAST_NOISE`, 0 for no rounds.

    Raises:
        PrivacyError: `rounds` is negative or `delta` out of range.
    """
    check_budget(rounds=rounds, delta=delta)
    if rounds == 0:
        return 0.0
    if mechanism.noise_multiplier < LEAST_NOISE:
        return math.inf
    if mechanism.sampler in _GAUSSIAN:
        return _gaussian_epsilon(mechanism.noise_multiplier, rounds=mechanism.releases(rounds), delta=delta)
    return _composed_epsilon(((mechanism, rounds),), mechanism.relation, delta=delta)


@lru_cache(maxsize=256)
def epsilon_under(mechanism: SampledGaussian, relation: Relation, *, rounds: int, delta: float) -> float:
    """Returns the epsilon of `rounds` rounds under either relation, whichever the headline's is.

    `poisson` and `fixed` by the PLD of the truncated event under that relation, `all` and `cyclic` exactly, at z/2
    for replacing a hospital. Displacing a hospital is accounted as replacing it, so `fixed` gives the same figure
    twice, but for a cohort of all.
    """
    check_budget(rounds=rounds, delta=delta)
    multiplier = mechanism.noise_multiplier
    if relation == mechanism.relation or rounds == 0 or multiplier < LEAST_NOISE:
        return epsilon(mechanism, rounds=rounds, delta=delta)
    if mechanism.sampler in _GAUSSIAN:
        return _gaussian_epsilon(multiplier / 2, rounds=mechanism.releases(rounds), delta=delta)
    return _composed_epsilon(((mechanism, rounds),), relation, delta=delta)


def epsilon_under_both_relations(report: dict[str, Any]) -> dict[str, Any]:
    """Returns `epsilon_<relation>` of a report's setting, the headline's relation first, and `other_relation`.

    Args:
        report: of `epsilon_report` or `calibration.solve`. None means unbounded there and here.
    """
    fields = ("sampler", "hospitals", "cohort", "noise_multiplier", "truncation")
    mechanism = SampledGaussian(**{field: report[field] for field in fields})
    other: Relation = "replace_one" if mechanism.relation == "add_or_remove_one" else "add_or_remove_one"
    relations: tuple[Relation, Relation] = (mechanism.relation, other)
    figures: dict[str, Any] = {
        f"epsilon_{relation}": finite(
            epsilon_under(mechanism, relation, rounds=report["rounds"], delta=report["delta"])
        )
        for relation in relations
    }
    return figures | {"other_relation": other}


@lru_cache(maxsize=256)
def beside_epsilon(mechanism: SampledGaussian, *, rounds: int, delta: float) -> float:
    """Returns the second epsilon, a check on the headline and never a substitute for it.

    RDP does not double the sensitivity under replace-one, hence z/2 for `fixed`. RDP cannot express
    truncation: the Poisson figure leaves it out. `all` and `cyclic` are given for replacing a hospital.
    """
    check_budget(rounds=rounds, delta=delta)
    multiplier = mechanism.noise_multiplier
    if rounds == 0:
        return 0.0
    if multiplier < LEAST_NOISE:
        return math.inf
    if mechanism.sampler in _GAUSSIAN:
        return _gaussian_epsilon(multiplier / 2, rounds=mechanism.releases(rounds), delta=delta)
    if mechanism.sampler == "poisson":
        event = dp_accounting.PoissonSampledDpEvent(
            mechanism.sampling_probability, dp_accounting.GaussianDpEvent(multiplier)
        )
    else:
        event = dp_accounting.SampledWithoutReplacementDpEvent(
            mechanism.hospitals, mechanism.cohort, dp_accounting.GaussianDpEvent(multiplier / 2)
        )
    accountant = RdpAccountant(neighboring_relation=_NEIGHBOURS[mechanism.relation])
    with _without_order_warnings():
        return float(accountant.compose(event, rounds).get_epsilon(delta))


def resolve_truncation(mechanism: SampledGaussian, *, rounds: int, delta: float) -> SampledGaussian:
    """Returns a Poisson mechanism without a cap with the smallest one costing at most `TRUNCATION_COST`.

    The cap is H where no smaller one is so cheap, and without noise, where nothing pays for dropping
    hospitals. Other mechanisms come back unchanged.
    """
    if mechanism.sampler != "poisson" or mechanism.truncation is not None:
        return mechanism
    low, high = mechanism.cohort, mechanism.hospitals
    if mechanism.noise_multiplier < LEAST_NOISE:
        low = high
    rounds = max(rounds, 1)
    affordable = (1 + TRUNCATION_COST) * epsilon(mechanism, rounds=rounds, delta=delta)
    while low < high:
        middle = (low + high) // 2
        cost = epsilon(replace(mechanism, truncation=middle), rounds=rounds, delta=delta)
        low, high = (low, middle) if cost <= affordable else (middle + 1, high)
    return replace(mechanism, truncation=high)


@lru_cache(maxsize=4096)
def epsilon_of_all(spent: tuple[tuple[SampledGaussian, int], ...], *, delta: float) -> float:
    """Returns the epsilon of several Poisson mechanisms together, each run for its number of rounds.

    The relation is adding or removing one, in each of them at once. As `epsilon`, infinite where one of them has
    next to no noise, 0 for no rounds.

    Raises:
        PrivacyError: `delta` is out of range.
    """
    for _, rounds in spent:
        check_budget(rounds=rounds, delta=delta)
    merged: dict[SampledGaussian, int] = {}
    for mechanism, rounds in spent:
        if rounds > 0:
            merged[mechanism] = merged.get(mechanism, 0) + rounds
    if any(mechanism.noise_multiplier < LEAST_NOISE for mechanism in merged):
        return math.inf
    if len(merged) <= 1:
        return max(
            (epsilon(mechanism, rounds=rounds, delta=delta) for mechanism, rounds in merged.items()), default=0.0
        )
    return _composed_epsilon(tuple(merged.items()), "add_or_remove_one", delta=delta)


def beside_epsilon_of_all(spent: tuple[tuple[SampledGaussian, int], ...], *, delta: float) -> float:
    """Returns the RDP figure beside `epsilon_of_all`, of the untruncated events."""
    if any(rounds > 0 and mechanism.noise_multiplier < LEAST_NOISE for mechanism, rounds in spent):
        return math.inf
    if not any(rounds > 0 for _, rounds in spent):
        return 0.0
    accountant = RdpAccountant(neighboring_relation=_NEIGHBOURS["add_or_remove_one"])
    with _without_order_warnings():
        for mechanism, rounds in spent:
            if rounds > 0:
                gaussian = dp_accounting.GaussianDpEvent(mechanism.noise_multiplier)
                event = dp_accounting.PoissonSampledDpEvent(mechanism.sampling_probability, gaussian)
                accountant.compose(event, rounds)
        return float(accountant.get_epsilon(delta))


def _composed_epsilon(spent: tuple[tuple[SampledGaussian, int], ...], relation: Relation, *, delta: float) -> float:
    rounds = sum(count for _, count in spent)
    # One grid for all of them: distributions compose on a common one only.
    step = max(_grid_step(mechanism, relation, rounds) for mechanism, _ in spent)
    parts = [_privacy_loss(mechanism, relation, step).self_compose(count) for mechanism, count in spent]
    return float(functools.reduce(lambda one, other: one.compose(other), parts).get_epsilon_for_delta(delta))


def _gaussian_epsilon(noise_multiplier: float, *, rounds: int, delta: float) -> float:
    # T Gaussian releases are exactly one whose noise multiplier is smaller by sqrt(T). Far from the answer the
    # search inside takes the logarithm of a delta of 0: the limit it returns is the right one.
    with np.errstate(divide="ignore"):
        return float(dp_accounting.get_epsilon_gaussian(noise_multiplier / math.sqrt(rounds), delta))


@lru_cache(maxsize=4)  # one distribution can hold tens of MB
def _privacy_loss(
    mechanism: SampledGaussian, relation: Relation, grid_step: float
) -> privacy_loss_distribution.PrivacyLossDistribution:
    # What PLDAccountant builds for this event, kept so that a curve over rounds pays for it once.
    event = mechanism.event
    assert isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent)
    return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
        dataset_size=event.dataset_size,
        sampling_probability=event.sampling_probability,
        truncated_batch_size=event.truncated_batch_size,
        noise_multiplier=event.noise_multiplier,
        value_discretization_interval=grid_step,
        neighboring_relation=_NEIGHBOURS[relation],
    )


def _grid_step(mechanism: SampledGaussian, relation: Relation, rounds: int) -> float:
    # Connecting the dots on a grid of step h raises epsilon by about 0.27 T h^2 (measured): T h^2 <= 1e-4
    # keeps that below 3e-5 with no more points than it takes.
    step = next((step for step in (1e-3, 5e-4, 2e-4) if rounds * step**2 <= 1e-4), 1e-4)
    # Little noise spreads the losses wider than memory holds at that step, and epsilon is then in the
    # hundreds: widen the grid. Displacing a hospital moves the accountant's mean by 4S, replacing one by 2S.
    displaces = mechanism.num_slots < mechanism.hospitals
    distance = (4 if displaces else 2 if relation == "replace_one" else 1) / mechanism.noise_multiplier
    width = distance**2 / 2 + 16 * distance * math.sqrt(1 + rounds * mechanism.sampling_probability)
    while width / step > 2**21:
        step *= 2
    return step


@contextmanager
def _without_order_warnings() -> Iterator[None]:
    # RdpAccountant logs one warning for every order it leaves out; fewer orders only loosen the bound.
    def keep(record: logging.LogRecord) -> bool:
        return "Excluding this order" not in str(record.msg)

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def check_budget(*, rounds: int, delta: float) -> None:
    """Refuses rounds or a delta out of range.

    Raises:
        PrivacyError: the first of them.
    """
    if rounds < 0:
        raise PrivacyError("rounds", rounds, "must not be negative")
    if not SMALLEST_DELTA <= delta < 1:
        raise PrivacyError("delta", delta, f"must be at least {SMALLEST_DELTA} and below 1")


def finite(figure: float) -> float | None:
    """Returns an epsilon as JSON can hold it: None for an unbounded one."""
    return figure if math.isfinite(figure) else None


def _remark(mechanism: SampledGaussian, headline: float, delta: float) -> str:
    remarks = []
    if math.isinf(headline):
        remarks.append("nothing bounds what a hospital reveals")
    elif headline > MEANINGFUL_EPSILON:
        remarks.append(f"an epsilon above {MEANINGFUL_EPSILON} protects nobody")
    if mechanism.sampler in ("poisson", "fixed") and mechanism.cohort < mechanism.hospitals:
        remarks.append("amplified by sampling: holds against whoever does not learn the cohorts, which a ledger names")
    if mechanism.hospitals < 20:
        remarks.append(
            f"{mechanism.hospitals} hospitals are too few to hide one of them at useful accuracy; "
            "patients are the unit that fits"
        )
    if delta * mechanism.hospitals >= 1:
        remarks.append(f"delta should stay well below 1/{mechanism.hospitals}")
    return "; ".join(remarks)
