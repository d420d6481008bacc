"""Which hospitals take part in a round: fixed shapes, so that one compiled program serves every round."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Cohort(NamedTuple):
    """The hospitals of one round.

    Attributes:
        indices: `(slots,)` int32, distinct hospital numbers, in range also where masked.
        mask: `(slots,)` bool, True where the hospital takes part.
    """

    indices: Array
    mask: Array


def sample_all(*, num_hospitals: int) -> Cohort:
    """Returns every hospital, in order."""
    return Cohort(jnp.arange(num_hospitals, dtype=jnp.int32), jnp.ones(num_hospitals, bool))


def sample_fixed(*, key: Array, num_hospitals: int, cohort: int) -> Cohort:
    """Returns `cohort` distinct hospitals, every subset of that size being equally likely."""
    return Cohort(_permutation(key, num_hospitals)[:cohort], jnp.ones(cohort, bool))


def sample_poisson(*, key: Array, num_hospitals: int, cohort: int, truncation: int) -> Cohort:
    """Returns each hospital independently with probability `cohort / num_hospitals`, at most `truncation`.

    When more are drawn, a uniformly random subset of that size stays: the event that is accounted, truncated
    Poisson sampling (Ganesh 2025, arXiv:2508.15089). Drawn hospitals come first; the other slots are masked.
    """
    draw_key, order_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    if cohort == num_hospitals:
        drawn = jnp.ones(num_hospitals, bool)
    else:
        # 32 random bits against a threshold rounded down: the probability is never above the one accounted,
        # as it could be with a float32 uniform, whose grid is 2^-23.
        threshold = jnp.uint32(2**32 * cohort // num_hospitals)
        drawn = jax.random.bits(draw_key, (num_hospitals,), jnp.uint32) < threshold
    order = _permutation(order_key, num_hospitals)
    drawn_first = order[jnp.argsort(~drawn[order], stable=True)][:truncation]
    return Cohort(drawn_first, drawn[drawn_first])


def _permutation(key: Array, num_hospitals: int) -> Array:
    return jax.random.permutation(key, jnp.arange(num_hospitals, dtype=jnp.int32))
