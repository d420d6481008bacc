"""How a cohort's clipped updates become one: the sum that the privacy statement is about, or a robust rule."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from pydantic import Field

from capsfl.federated import robust
from capsfl.federated.secure import SecureSum
from capsfl.federated.votes import VotingRule, check_votes
from capsfl.learning.tasks import Task
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.plan import PrivacyPlan
from capsfl.settings import Settings


class AggregationConfig(Settings):
    """The rule by which updates are combined."""

    rule: Literal["mean", "weighted", "median", "trimmed_mean", "krum", "multi_krum", "mae_votes"] = "mean"
    """`mean` divides the sum by the expected cohort; the others withstand liars or count records, without noise.
    `mae_votes` weighs models by the error that the other hospitals find in them (Eq 17 and 18)."""
    trim: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of the cohort that `trimmed_mean` leaves out at each end."""
    byzantine: int = Field(default=0, ge=0)
    """f, how many liars a rule withstands: `krum` and `multi_krum` need 2 f + 3 hospitals, `mae_votes` 2 f + 2."""
    selected: int = Field(default=2, ge=1)
    """Updates that `multi_krum` averages."""
    gamma: float = Field(default=1.0, ge=0)
    """Weight that `mae_votes` gives a model's own error against the mean error of all (Eq 18)."""
    margin: float | None = Field(default=None, ge=0, le=1)
    """How far above the median model's error `mae_votes` lets a model lie before it is out-voted; any when absent."""
    vote_decimals: int = Field(default=4, ge=1, le=4)
    """Decimals of a vote of `mae_votes`: the fewer, the less it tells of the voter's records."""
    self_report: bool = False
    """Whether hospitals also vote on their own models, as the paper has it: a liar reports 0."""
    secure: bool = False
    """Adds up masked words, so that the server learns the sum and no single update (simulated); `mean` only."""
    secure_bits: int = Field(default=32, ge=2, le=32)
    """Bits of a masked word: fewer save traffic and round more coarsely."""
    secure_neighbours: int | None = Field(default=None, ge=2, multiple_of=2)
    """Hospitals that each one shares masks with; all others when absent, which costs the square of the cohort."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance that a hospital drops out of a round after its training, so that its update never arrives."""


Rule = Callable[[Any, jax.Array, jax.Array], Any]
"""`(updates (slots, ...), counts (slots,), mask (slots,)) -> update`; a masked slot has no say."""


UNCOVERED: Mapping[str, str] = {
    "weighted": "it divides by the realised records, which no noise fixed beforehand covers",
    "median": "the noise is calibrated to a sum, and a median is none",
    "trimmed_mean": "the noise is calibrated to a sum, and leaving out depends on everybody's update",
    "krum": "it selects by un-noised updates",
    "multi_krum": "it selects by un-noised updates",
    "mae_votes": "it weighs by un-noised votes, which tell of the voters' records",
}
"""Why the noise of the privacy statement, which survives `mean`, secure or not, does not cover a rule."""

_USED_BY: Mapping[str, tuple[str, ...]] = {
    "trim": ("trimmed_mean",),
    "byzantine": ("krum", "multi_krum", "mae_votes"),
    "selected": ("multi_krum",),
    "gamma": ("mae_votes",),
    "margin": ("mae_votes",),
    "vote_decimals": ("mae_votes",),
    "self_report": ("mae_votes",),
}


def make_rule(config: AggregationConfig, plan: PrivacyPlan) -> Rule | None:
    """Builds the rule over stacked updates; None for the sum, which needs no stack, and for votes.

    Raises:
        PrivacyError: the plan adds noise, which is calibrated to a sum, its cohort is too small for the rule, or a
            field is set that the rule has no use for.
    """
    _refuse_unused(config)
    if config.rule == "mean":
        return None
    # Rules over updates that each hospital has noised itself are post-processing, and its local epsilon holds.
    beside = plan.config.local_epsilon is not None and config.rule in ("weighted", "mae_votes")
    if plan.noises_sum or beside:
        without = "leave privacy.local_epsilon out" if beside else "set privacy.noise_multiplier to 0"
        raise PrivacyError(
            "aggregation.rule",
            config.rule,
            f"{UNCOVERED[config.rule]}, so no epsilon would hold; choose mean, or {without}",
        )
    if config.rule == "mae_votes":
        return None
    if config.rule == "weighted" and plan.patients is not None:
        remedy = 'it counts records, and a patient\'s records are what unit "patient" protects; choose another rule'
        raise PrivacyError("aggregation.rule", config.rule, remedy)
    if config.rule == "weighted":
        return lambda updates, counts, mask: robust.weighted_mean(updates, counts.astype("float32"), mask)
    if config.rule == "median":
        return lambda updates, counts, mask: robust.coordinate_median(updates, mask)
    if config.rule == "trimmed_mean":
        return lambda updates, counts, mask: robust.trimmed_mean(updates, mask, trim=config.trim)
    selected = 1 if config.rule == "krum" else config.selected
    try:
        robust.check_krum(slots=plan.num_slots, byzantine=config.byzantine, selected=selected)
    except PrivacyError as error:
        raise error.under("aggregation") from None
    return lambda updates, counts, mask: robust.krum(updates, mask, byzantine=config.byzantine, selected=selected)


def make_voting_rule(config: AggregationConfig, plan: PrivacyPlan, task: Task) -> VotingRule | None:
    """Builds the rule that lets the cohort vote on its models; None for every other rule.

    Raises:
        PrivacyError: the task has no absolute error to vote by, patients are protected from the hospitals' votes, or
            the cohort is too small for the liars.
    """
    if config.rule != "mae_votes":
        return None
    if task.absolute_error is None:
        raise PrivacyError(
            "aggregation.rule",
            config.rule,
            f'task "{task.name}" has no absolute error to vote by; give it one (`make_task(absolute_error=...)`), or '
            "choose another rule",
        )
    if plan.patients is not None:
        remedy = f'{UNCOVERED["mae_votes"]}, which unit "patient" protects; choose another rule'
        raise PrivacyError("aggregation.rule", config.rule, remedy)
    try:
        check_votes(config.byzantine, plan.num_slots)
    except PrivacyError as error:
        raise error.under("aggregation") from None
    return VotingRule(
        task.absolute_error,
        byzantine=config.byzantine,
        gamma=config.gamma,
        margin=config.margin,
        steps=10**config.vote_decimals,
        self_report=config.self_report,
    )


def make_secure_sum(
    config: AggregationConfig, plan: PrivacyPlan, parameters: Any, *, scaffold: bool = False, diagnostics: bool = False
) -> SecureSum | None:
    """Builds the arithmetic of secure aggregation; None where it is off.

    The privacy statement survives it: integers of L2 norm at most S are added up, and the noise comes on top.

    Args:
        config: the `aggregation` section.
        plan: gives the slots and what is released.
        parameters: a pytree of the weights' shapes.
        scaffold: whether hospitals hand control variates over as well.
        diagnostics: whether the spread of the updates is measured.

    Raises:
        PrivacyError: something in the configuration needs single updates at the server, or the words are too narrow.
    """
    if not config.secure:
        return None
    needs = {
        ("aggregation.rule", config.rule, "mean"): config.rule != "mean",
        ("privacy.clipping", "median", "fixed or quantile"): plan.config.clipping == "median",
        ("privacy.mechanism", "laplace", "gaussian"): plan.config.local_epsilon is not None,
        ("privacy.unit", "patient", "hospital"): plan.patients is not None,
        ("scaffold", "true", "false"): scaffold,
        ("diagnostics", "true", "false"): diagnostics,
    }
    for (field, value, instead), needed in needs.items():
        if needed:
            unbounded = value in ("laplace", "patient")
            why = "no bound keeps its updates from wrapping" if unbounded else "it needs each update by itself"
            remedy = f"{why}, and aggregation.secure hands over sums only; choose {instead}, or switch secure off"
            raise PrivacyError(field, value, remedy)
    dimension = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(parameters))
    try:
        return SecureSum(plan.num_slots, dimension, config.secure_bits, config.secure_neighbours)
    except PrivacyError as error:
        raise error.under("aggregation") from None


def _refuse_unused(config: AggregationConfig) -> None:
    """Refuses a field that is set and would do nothing."""
    for field, rules in _USED_BY.items():
        value = getattr(config, field)
        if value != AggregationConfig.model_fields[field].default and config.rule not in rules:
            remedy = f'rule "{config.rule}" has no use for it; choose {" or ".join(rules)}, or leave it out'
            raise PrivacyError(f"aggregation.{field}", value, remedy)
    for field in ("secure_bits", "secure_neighbours"):
        value = getattr(config, field)
        if value != AggregationConfig.model_fields[field].default and not config.secure:
            remedy = "only secure aggregation has a use for it; set aggregation.secure = true, or leave it out"
            raise PrivacyError(f"aggregation.{field}", value, remedy)
