"""Consensus by mean absolute error: every hospital of the cohort scores the others' models, and the scores weigh them.

    MAE(m_j) = median_i  (1/n_i) sum |y - f_j(x)|            over hospital i's own n_i records, i other than j
    MAE(H_j) = gamma MAE(m_j) + (1/|M|) sum_i MAE(m_i)

(Kumar et al. 2020, Eq 17 and 18.) The paper lets a hospital report the error of its own model, which a liar reports
as 0. Here the others measure it, and the median of their votes counts, so a minority of false votes cannot decide.
The weight 1 / MAE(H_j) is ours, since the paper leaves open how its figure combines models: gamma = 0 weighs all
alike, a large gamma weighs by the votes alone. Votes are rounded, and who is out-voted is decided in whole numbers, so
that whoever reads the ballots in a ledger comes to the same decision and the same weights.

Votes judge what a model gets wrong, not how far it moved: an update blown up in a useful direction can win them, and
is held by the clip norm alone. m hospitals cost m^2 evaluations over their records; models are scored one after the
other, so memory stays that of one. Data-dependent and un-noised: no privacy statement covers it.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from capsfl.federated.robust import coordinate_median, weighted_mean
from capsfl.privacy.events import PrivacyError

AbsoluteError = Callable[[Any, Any], jax.Array]
"""`(parameters, batch) -> (batch,)`: the mean absolute error of each record."""


class VotingRule(NamedTuple):
    """What `aggregation.rule = "mae_votes"` does in a round.

    Attributes:
        error: the absolute error of each record of a batch, by which votes are cast; clipped to [0, 1].
        batch_size: records scored at once.
        byzantine: f, the models with the highest MAE(m_j) that are left out.
        gamma: weight of a model's own error against the mean of all (Eq 18).
        margin: how far above the median model's error a model may lie; None for any distance.
        steps: between 0 and 1, to which votes are rounded.
        self_report: whether hospitals also vote on their own models, as the paper has it; gameable.
    """

    error: AbsoluteError
    batch_size: int = 16
    byzantine: int = 0
    gamma: float = 1.0
    margin: float | None = None
    steps: int = 10_000
    self_report: bool = False


class Votes(NamedTuple):
    """Un-noised votes of a round: for the hospitals and their ledger, and covered by no epsilon.

    Attributes:
        errors: `(slots, slots)`, the mean absolute error that the hospital of a row found in the model of a column;
            NaN where there is no vote: on its own model, by or on somebody who is not there.
        weights: `(slots,)`, the shares of the models in the mean; they add up to 1, or to 0 where the cohort was too
            small for its liars and its coordinate median stood in.
    """

    errors: jax.Array
    weights: jax.Array


def cast_votes(
    rule: VotingRule, parameters: Any, updates: Any, records: Any, counts: jax.Array, own: jax.Array, usable: jax.Array
) -> jax.Array:
    """Returns what some hospitals find in the cohort's models: errors `(voters, slots)`, NaN where there is no vote.

    Args:
        rule: the error and its batches.
        parameters: the server's weights, to which an update is added to give a model.
        updates: leaves `(slots, ...)`, the clipped updates of the whole cohort.
        records: leaves `(voters, records, ...)`.
        counts: `(voters,)` int32, real records of each voter; none for one that is not there.
        own: `(voters,)` int32, the slot of each voter's own model, on which it has no vote.
        usable: `(slots,)` bool, the models that are there.
    """
    capacity = jax.tree.leaves(records)[0].shape[1]

    def score(model: Any, rows: Any, count: jax.Array) -> jax.Array:
        def add(batch: jax.Array, total: jax.Array) -> jax.Array:
            slots = batch * rule.batch_size + jnp.arange(rule.batch_size)
            errors = rule.error(model, jax.tree.map(lambda leaf: leaf[jnp.minimum(slots, capacity - 1)], rows))
            return total + jnp.where(slots < count, jnp.clip(errors, 0, 1), 0).sum()

        batches = (count + rule.batch_size - 1) // rule.batch_size
        total = jax.lax.fori_loop(0, batches, add, jnp.float32(0))
        return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)

    def judge(slot: jax.Array) -> jax.Array:
        model = jax.tree.map(lambda w, u: w + u[slot], parameters, updates)
        # Nobody reads a record for a vote that does not count.
        read = jnp.where(usable[slot] & ((own != slot) | rule.self_report), counts, 0)
        found = jax.lax.map(lambda voter: score(model, *voter), (records, read))
        return jnp.round(found * rule.steps) / rule.steps

    return jax.lax.map(judge, jnp.arange(usable.shape[0])).T


def weigh(
    votes: jax.Array,
    usable: jax.Array,
    *,
    byzantine: int = 0,
    gamma: float = 1.0,
    margin: float | None = None,
    steps: int = 10_000,
) -> jax.Array:
    """Returns the shares `(slots,)` of the models: 1 / MAE(H_j) of those not out-voted; they add up to 1.

    Votes that are not finite are left out. A model on which no finite vote was cast counts as wrong throughout, error
    1: a false voter can keep silent, but a model that gives everybody NaN is broken. Models of equal error share one
    fate, so that less than `byzantine` of them may be left out.

    Args:
        votes: `(slots, slots)`, the error that a row's hospital found in a column's model, in whole steps.
        usable: `(slots,)` bool, the models that are there.
        byzantine: f, how many models are left out; a round that realises fewer than 2 f + 2 must not use the shares.
        gamma: of Eq 18, at least 0.
        margin: how far above the median model's error a model may lie; None for any distance.
        steps: between 0 and 1, at most 10,000.
    """
    finite, slots = jnp.isfinite(votes), usable.shape[0]
    whole = jnp.round(jnp.clip(votes, 0, 1) * steps).astype(jnp.int32)
    cast = jnp.where(finite.any(axis=0), _middle_sum(whole, finite), 2 * steps)  # the median times 2 steps
    error, count = cast / (2 * steps), usable.sum()
    everybody = jnp.where(usable, error, 0).sum() / jnp.maximum(count, 1)
    # The floor stands for a cohort without any error, whose models weigh alike.
    figure = jnp.maximum(gamma * error + everybody, 1e-6)
    ranked = jnp.sort(jnp.where(usable, cast, 2 * steps + 1))
    kept = usable & (cast <= ranked[jnp.clip(count - byzantine - 1, 0, slots - 1)])
    if margin is not None:
        allowed = math.floor(Fraction(repr(margin)) * 4 * steps)
        kept &= 2 * cast <= _middle_sum(cast[:, None], usable[:, None])[0] + allowed
    weights = jnp.where(kept, 1 / figure, 0)
    return weights / jnp.maximum(weights.sum(), 1e-30)


def _middle_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The sum of the two middle values of each column under the mask, which is twice their median."""
    ordered = jnp.sort(jnp.where(mask, values, jnp.iinfo(jnp.int32).max), axis=0)
    count = mask.sum(axis=0)
    places = jnp.stack([jnp.maximum(count - 1, 0) // 2, jnp.minimum(count // 2, len(values) - 1)])
    low, high = jnp.take_along_axis(ordered, places, axis=0)
    return jnp.where(count > 0, low, 0) + jnp.where(count > 0, high, 0)


def combine_by_votes(updates: Any, votes: jax.Array, usable: jax.Array, rule: VotingRule) -> tuple[Any, Votes]:
    """Returns the mean of `(slots, ...)` updates weighed by votes, and the votes with their weights.

    A cohort that realises fewer than `2 * byzantine + 2` models gives the coordinate median: liars could make up half
    of the votes on a model.
    """
    weights = weigh(votes, usable, byzantine=rule.byzantine, gamma=rule.gamma, margin=rule.margin, steps=rule.steps)
    if not rule.byzantine:
        return weighted_mean(updates, weights, usable), Votes(votes, weights)
    enough = usable.sum() >= 2 * rule.byzantine + 2
    mean, median = weighted_mean(updates, weights, usable), coordinate_median(updates, usable)
    combined = jax.tree.map(lambda one, other: jnp.where(enough, one, other), mean, median)
    return combined, Votes(votes, jnp.where(enough, weights, 0))


def check_votes(byzantine: int, slots: int) -> None:
    """Refuses more liars than the votes of a cohort can bear.

    Raises:
        PrivacyError: fewer than 2 f + 2 hospitals in a round.
    """
    if byzantine and slots < 2 * byzantine + 2:
        remedy = f"mae_votes needs 2 f + 2 hospitals in a round and has {slots}; lower it or draw more"
        raise PrivacyError("byzantine", byzantine, remedy)
