"""How a cohort's clipped updates become one: the sum that the privacy statement is about, or a robust rule."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from pydantic import Field

from capsfl.federated import robust
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.plan import PrivacyPlan
from capsfl.settings import Settings


class AggregationConfig(Settings):
    """The rule by which updates are combined."""

    rule: Literal["mean", "weighted", "median", "trimmed_mean", "krum", "multi_krum"] = "mean"
    """`mean` divides the sum by the expected cohort; the others withstand liars or count records, without noise."""
    trim: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of the cohort that `trimmed_mean` leaves out at each end."""
    byzantine: int = Field(default=0, ge=0)
    """f, how many liars `krum` and `multi_krum` withstand; they need 2 f + 3 hospitals."""
    selected: int = Field(default=2, ge=1)
    """Updates that `multi_krum` averages."""


Rule = Callable[[Any, jax.Array, jax.Array], Any]
"""`(updates (slots, ...), counts (slots,), mask (slots,)) -> update`; a masked slot has no say."""


UNCOVERED: Mapping[str, str] = {
    "weighted": "it divides by the realised records, which no noise fixed beforehand covers",
    "median": "the noise is calibrated to a sum, and a median is none",
    "trimmed_mean": "the noise is calibrated to a sum, and leaving out depends on everybody's update",
    "krum": "it selects by un-noised updates",
    "multi_krum": "it selects by un-noised updates",
}
"""Why the noise of the privacy statement, which survives `mean`, does not cover a rule."""


def make_rule(config: AggregationConfig, plan: PrivacyPlan) -> Rule | None:
    """Builds the rule over stacked updates; None for the sum, which needs no stack.

    Raises:
        PrivacyError: the plan adds noise, which is calibrated to a sum, or its cohort is too small for the rule.
    """
    if config.rule == "mean":
        return None
    if plan.config.noise_multiplier > 0:
        raise PrivacyError(
            "aggregation.rule",
            config.rule,
            f"{UNCOVERED[config.rule]}, so no epsilon would hold; choose mean, or set privacy.noise_multiplier to 0",
        )
    if config.rule == "weighted":
        return lambda updates, counts, mask: robust.weighted_mean(updates, counts.astype("float32"), mask)
    if config.rule == "median":
        return lambda updates, counts, mask: robust.coordinate_median(updates, mask)
    if config.rule == "trimmed_mean":
        return lambda updates, counts, mask: robust.trimmed_mean(updates, mask, trim=config.trim)
    selected = 1 if config.rule == "krum" else config.selected
    if plan.num_slots < 2 * config.byzantine + 3:
        raise PrivacyError(
            "aggregation.byzantine",
            config.byzantine,
            f"{config.rule} needs 2 f + 3 hospitals in a round and has {plan.num_slots}; lower it or draw more",
        )
    if selected > plan.num_slots - config.byzantine - 2:
        raise PrivacyError(
            "aggregation.selected",
            selected,
            f"multi_krum averages at most cohort - f - 2 = {plan.num_slots - config.byzantine - 2} updates",
        )
    return lambda updates, counts, mask: robust.krum(updates, mask, byzantine=config.byzantine, selected=selected)
