"""Aggregation rules over one cohort's stacked updates: weighted mean, median, trimmed mean, Krum."""

from typing import Any

import jax
import jax.numpy as jnp

from capsfl.learning.tasks import trainable
from capsfl.privacy.events import PrivacyError


def _column(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    return mask.reshape((-1,) + (1,) * (leaf.ndim - 1))


def _clear(updates: Any, mask: jax.Array) -> Any:
    # where, not a product: 0 * NaN is NaN.
    return jax.tree.map(lambda leaf: jnp.where(_column(mask, leaf), leaf, 0), updates)


def weighted_mean(updates: Any, weights: jax.Array, mask: jax.Array) -> Any:
    """Mean of `(slots, ...)` leaves with weights `(slots,)` over the mask; zero when nothing has weight."""
    shares = jnp.where(mask, weights, 0)
    total = shares.sum()
    shares = shares / jnp.where(total > 0, total, 1)
    return jax.tree.map(lambda leaf: jnp.tensordot(shares.astype(leaf.dtype), leaf, 1), _clear(updates, mask))


def _mean_of_ranks(updates: Any, mask: jax.Array, low: jax.Array, high: jax.Array) -> Any:
    """Mean of the sorted values with rank in `[low, high)`, coordinate by coordinate."""
    ranks = jnp.arange(mask.shape[0])
    kept = (ranks >= low) & (ranks < high)
    count = jnp.maximum(kept.sum(), 1)

    def reduce(leaf: jax.Array) -> jax.Array:
        # Empty slots sort behind every finite value.
        ordered = jnp.sort(jnp.where(_column(mask, leaf), leaf, jnp.inf), axis=0)
        return (jnp.where(_column(kept, leaf), ordered, 0) / count.astype(leaf.dtype)).sum(0)

    return jax.tree.map(reduce, updates)


def coordinate_median(updates: Any, mask: jax.Array) -> Any:
    """Median of each coordinate over the mask (Yin et al. 2018); zero for an empty cohort."""
    count = mask.sum()
    return _mean_of_ranks(updates, mask, jnp.maximum(count - 1, 0) // 2, jnp.where(count > 0, count // 2 + 1, 0))


def trimmed_mean(updates: Any, mask: jax.Array, *, trim: float) -> Any:
    """Mean without the `floor(trim * count)` smallest and largest values of each coordinate (Yin et al. 2018).

    Raises:
        PrivacyError: `trim` is outside [0, 0.5).
    """
    if not 0 <= trim < 0.5:
        raise PrivacyError("trim", trim, "cut a fraction in [0, 0.5) at each end")
    count = mask.sum()
    # The margin keeps 0.1 * 30 from falling to 2 in float32.
    cut = jnp.floor(trim * count + 1e-4).astype(count.dtype)
    cut = jnp.minimum(cut, jnp.maximum(count - 1, 0) // 2)
    return _mean_of_ranks(updates, mask, cut, count - cut)


def check_krum(*, slots: int, byzantine: int, selected: int = 1) -> None:
    """Refuses a cohort that can never hold enough updates for Krum.

    Raises:
        PrivacyError: fewer than 2 f + 3 slots, or more updates selected than slots - f - 2; f below 0.
    """
    if byzantine < 0 or slots < 2 * byzantine + 3:
        remedy = f"Krum needs 2 f + 3 hospitals in a round, f >= 0, and has {slots}; lower it or draw more"
        raise PrivacyError("byzantine", byzantine, remedy)
    most = slots - byzantine - 2
    if not 1 <= selected <= most:
        raise PrivacyError("selected", selected, f"multi-Krum averages 1 to cohort - f - 2 = {most} updates")


def krum(updates: Any, mask: jax.Array, *, byzantine: int, selected: int = 1) -> Any:
    """Krum, or multi-Krum for `selected` > 1 (Blanchard et al. 2017).

    A cohort that realises fewer than `2 * byzantine + 3` (or `selected`) updates gives the coordinate median.

    Raises:
        PrivacyError: as `check_krum`.
    """
    slots = mask.shape[0]
    check_krum(slots=slots, byzantine=byzantine, selected=selected)
    # Centring on the median avoids cancellation in |a|² + |b|² - 2ab when updates share a large part.
    median = coordinate_median(updates, mask)
    centred = _clear(jax.tree.map(lambda leaf, middle: leaf - middle[None], updates, median), mask)
    # By the updates alone: no clip norm bounds the running statistics that may come with them.
    leaves = jax.tree.leaves(trainable(centred))
    flat = jnp.concatenate([leaf.reshape(slots, -1).astype(jnp.float32) for leaf in leaves], 1)
    # Scaling keeps the squares finite; the order of the scores does not depend on it.
    largest = jnp.max(jnp.abs(flat))
    flat = flat / jnp.where(largest > 0, largest, 1)
    gram = jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.diagonal(gram)
    distances = jnp.maximum(norms[:, None] + norms[None] - 2 * gram, 0)
    usable = mask[:, None] & mask[None] & ~jnp.eye(slots, dtype=bool)
    ordered = jnp.sort(jnp.where(usable, distances, jnp.inf), axis=1)
    count = mask.sum()
    near = jnp.arange(slots) < count - byzantine - 2
    scores = jnp.where(mask, jnp.where(near, ordered, 0).sum(1), jnp.inf)
    chosen = jnp.zeros(slots, bool).at[jnp.argsort(scores)[:selected]].set(True) & mask
    enough = count >= max(2 * byzantine + 3, selected + byzantine + 2)
    mean = weighted_mean(updates, jnp.ones(slots), chosen)
    return jax.tree.map(lambda one, other: jnp.where(enough, one, other), mean, median)
