"""Which hospitals take part in a round: fixed shapes, so that one compiled program serves every round."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


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


def sample_cyclic(*, number: ArrayLike, num_hospitals: int, cohort: int) -> Cohort:
    """Returns the hospitals whose turn it is: of ceil(H / m) groups, that of round `number`, and so on in turn.

    Hospital i is in group i mod ceil(H / m) whether or not the others are there, so no two rounds of one hospital
    are closer than the number of groups. Groups that are one hospital short have a masked last slot.

    Args:
        number: scalar int32, rounds of the run before this one.
        num_hospitals: H.
        cohort: m, at most H, the size of the largest group.
    """
    groups = -(-num_hospitals // cohort)
    indices = jnp.asarray(number, jnp.int32) % groups + groups * jnp.arange(cohort, dtype=jnp.int32)
    mask = indices < num_hospitals
    return Cohort(jnp.where(mask, indices, 0), mask)


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
    return _keep(order_key, drawn, truncation)


def sample_patients(*, key: Array, num_patients: Array, capacity: int, expected: int, truncation: int) -> Cohort:
    """Returns each of a hospital's patients with probability `expected / num_patients`, at most `truncation`.

    The same draw as `sample_poisson`, for a number of patients that is traced because hospitals, which run in one
    program, have different ones. Where `num_patients` is at most `expected`, all are drawn.

    Args:
        key: a key used for nothing else, new in every local step.
        num_patients: scalar int32, at most `capacity`; patients are numbered from 0.
        capacity: the most patients any hospital has.
        expected: the expected number of patients in a step.
        truncation: the most patients a step takes; `min(truncation, capacity)` slots come back.
    """
    draw_key, order_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    # The thresholds are integers, exact and rounded down: traced arithmetic would round them in float32.
    thresholds = np.array([min(2**32 * expected // max(n, 1), 2**32 - 1) for n in range(capacity + 1)], np.uint32)
    bits = jax.random.bits(draw_key, (capacity,), jnp.uint32)
    drawn = (bits < jnp.asarray(thresholds)[num_patients]) | (num_patients <= expected)
    drawn &= jnp.arange(capacity) < num_patients
    return _keep(order_key, drawn, truncation)


def _keep(order_key: Array, drawn: Array, truncation: int) -> Cohort:
    order = _permutation(order_key, drawn.shape[0])
    drawn_first = order[jnp.argsort(~drawn[order], stable=True)][:truncation]
    return Cohort(drawn_first, drawn[drawn_first])


def _permutation(key: Array, num_hospitals: int) -> Array:
    return jax.random.permutation(key, jnp.arange(num_hospitals, dtype=jnp.int32))
