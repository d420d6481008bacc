"""How the running statistics of batch normalisation cross hospitals: averaged like the weights, or each one's own.

Averaged (FedAvg), the server's model has the mean of the statistics that its cohort ended with. Own ones stay at home
from round to round (SiloBN, Andreux et al. 2020; FedBN, Li et al. 2021, arXiv:2102.07623, which keeps scale and offset
as well): a hospital trains and is scored with those of its own scanner.

Under noise statistics can only stay at home. They are no gradient, and a bound that holds layers of variances near 1
and near 1000 alike would drown the weights in the noise it asks for. What stays at home is no release: whatever a
hospital's own statistics are, its update is clipped to the same bound, so the privacy statement holds as it is. It
needs a sampler under which one hospital decides nothing about another's past, which a capped Poisson round does. The
run's checkpoints hold every hospital's statistics: they are for those who hold the records.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from capsfl.federated.aggregation import AggregationConfig
from capsfl.learning.tasks import BatchNormWeights, Task
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.plan import PrivacyConfig, PrivacyPlan

Kind = Literal["average", "local"]


class BatchNormRule(NamedTuple):
    """What a round does with statistics.

    Attributes:
        shared: the server's copy becomes the mean of the cohort's; otherwise it stays as it was at the start.
        own: every hospital keeps its own and starts from them; otherwise it starts from the server's copy.
    """

    shared: bool
    own: bool


def make_batch_norm(
    kind: Kind, task: Task, plan: PrivacyPlan, aggregation: AggregationConfig, *, noisy: bool = False
) -> BatchNormRule | None:
    """Builds the rule for a task; None for a model without batch normalisation, which both kinds leave alone.

    Kept `local`, the server's copy still becomes the cohort's mean where nothing is noised or masked, for the
    hospitals that a run has not seen.

    Args:
        kind: the configured rule.
        task: whose model it is.
        plan: tells whether noise is added.
        aggregation: the `aggregation` section.
        noisy: whether noise is added somewhere although this plan has none, as in the other studies of a sweep.

    Raises:
        PrivacyError: statistics would be released un-noised or unmasked, or a vote would need somebody else's.
    """
    if task.loss_and_statistics is None:
        return None
    noisy = noisy or plan.noises_sum or plan.config.local_epsilon is not None
    remedy = 'set it to "local", or give the model norm = "group"'
    if kind == "average" and noisy:
        why = "running statistics would be handed over un-noised, so no epsilon would hold"
        raise PrivacyError("batch_norm", kind, f"{why}; {remedy}")
    if kind == "average" and aggregation.secure:
        why = "running statistics have no bound by which aggregation.secure could mask them"
        raise PrivacyError("batch_norm", kind, f"{why}; {remedy}")
    if kind == "local" and aggregation.rule == "mae_votes":
        why = "who votes on another hospital's model would need statistics that stay at home"
        raise PrivacyError("batch_norm", kind, f'{why}; set it to "average", or choose another aggregation.rule')
    mechanism = plan.mechanism
    if kind == "local" and noisy and mechanism.sampler == "poisson" and mechanism.num_slots < mechanism.hospitals:
        why = (
            f"whom a round over its cap of {mechanism.num_slots} hospitals leaves out keeps older statistics, and "
            "would give away later who was there"
        )
        more = f'set privacy.truncation = {mechanism.hospitals}, or give the model norm = "group"'
        raise PrivacyError("batch_norm", kind, f"{why}; {more}")
    return BatchNormRule(shared=not (noisy or aggregation.secure), own=kind == "local")


def check_portable(task: Task, kind: Kind, privacy: PrivacyConfig, aggregation: AggregationConfig) -> None:
    """Refuses to take a model to a new hospital when all statistics stayed in those that it was trained in.

    Raises:
        ValueError: the server's copy is still that of the start, with which the network says nothing.
    """
    noisy = (privacy.unit == "hospital" and privacy.noise_multiplier > 0) or privacy.local_epsilon is not None
    if task.loss_and_statistics is not None and kind == "local" and (noisy or aggregation.secure):
        raise ValueError(
            f'{task.name}.batch_norm = "local": {"under noise" if noisy else "under secure aggregation"} the running '
            "statistics stay in the hospitals, and without any the network says nothing about a new scan; train it "
            'with norm = "group"'
        )


def start_statistics(rule: BatchNormRule | None, parameters: Any, hospitals: int) -> Any:
    """Returns every hospital's own statistics before the first round, leaves `(hospitals, ...)`; None without.

    They are NaN until a hospital has taken part, which stands for the server's copy.
    """
    if rule is None or not rule.own:
        return None
    return jax.tree.map(lambda leaf: jnp.full((hospitals, *leaf.shape), jnp.nan, leaf.dtype), parameters.statistics)


def _or_server(own: jax.Array, server: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(own), server, own)


def starting_weights(parameters: Any, statistics: Any, hospital: jax.Array | int) -> Any:
    """Returns what a hospital starts a round from, or is scored with: the server's weights, its own statistics."""
    if statistics is None:
        return parameters
    rows = jax.tree.map(lambda leaf: leaf[hospital], statistics)
    return parameters._replace(statistics=jax.tree.map(_or_server, rows, parameters.statistics))


def own_statistics(parameters: Any, statistics: Any, hospitals: Sequence[str], asked: Sequence[str]) -> Any:
    """Returns the statistics of the hospitals asked for, leaves `(asked, ...)`; None where nobody has their own.

    One that has not taken part, or is not among those of the run, takes the server's copy.
    """
    if statistics is None:
        return None
    places = [list(hospitals).index(name) if name in hospitals else None for name in asked]

    def rows(server: jax.Array, everybody: jax.Array) -> jax.Array:
        return jnp.stack([server if place is None else _or_server(everybody[place], server) for place in places])

    return jax.tree.map(rows, parameters.statistics, statistics)


def hand_over(contribution: Any, norm: jax.Array, found: Any, server: Any) -> tuple[BatchNormWeights, jax.Array]:
    """Joins a hospital's clipped update with the change of its statistics.

    Returns:
        Both, and the update's norm: NaN where a statistic is not finite, which discards the whole as NaN in the
        weights does.
    """
    change = jax.tree.map(jnp.subtract, found, server)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(change)]))
    both = BatchNormWeights(contribution, change)
    usable = finite & jnp.isfinite(norm)
    both = jax.tree.map(lambda leaf: jnp.where(usable, leaf, jnp.zeros_like(leaf)), both)
    return both, jnp.where(finite, norm, jnp.nan)


def mean_change(total: Any, usable: jax.Array) -> Any:
    """Returns the mean change of the statistics over those who took part.

    By the number there is, where the weights' sum is divided by the expected one: a variance must stay a mean of
    variances, and without noise there is no sensitivity to keep.
    """
    return jax.tree.map(lambda leaf: leaf / jnp.maximum(usable, 1), total)


def store_own(old: Any, found: Any, hospitals: jax.Array, counts: jax.Array) -> Any:
    """Writes the cohort's statistics `(slots, ...)` into everybody's `(hospitals, ...)`."""
    number = jax.tree.leaves(old)[0].shape[0]
    places = jnp.where(counts > 0, hospitals, number)  # past the end: an empty slot writes nothing
    return jax.tree.map(lambda o, f: o.at[places].set(f, mode="drop"), old, found)
