"""Eq 9-11: how far the hospitals' updates spread, layer by layer; un-noised, for the run's own log only."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Spread(NamedTuple):
    """Running moments of the updates: Welford's, merged as Chan et al. 1983 do."""

    count: jax.Array
    """Hospitals seen, a float32 scalar."""
    mean: Any
    """Mean update, in the shapes of the parameters."""
    squares: Any
    """Sum of squared deviations from the mean, same shapes."""


def start_spread(parameters: Any) -> Spread:
    """Moments of no hospital, in the shapes of `parameters`."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), parameters)
    return Spread(jnp.float32(0), zeros, zeros)


def measure_spread(updates: Any, mask: jax.Array) -> Spread:
    """Moments of one chunk: leaves `(slots, ...)`, mask `(slots,)`."""
    count = mask.sum().astype(jnp.float32)

    def column(leaf: jax.Array) -> jax.Array:
        return mask.reshape((-1,) + (1,) * (leaf.ndim - 1))

    mean = jax.tree.map(lambda x: jnp.where(column(x), x, 0).sum(0) / jnp.maximum(count, 1), updates)
    squares = jax.tree.map(lambda x, m: (jnp.where(column(x), x - m[None], 0) ** 2).sum(0), updates, mean)
    return Spread(count, mean, squares)


def merge_spread(one: Spread, other: Spread) -> Spread:
    """Moments of both groups together."""
    count = one.count + other.count
    share = other.count / jnp.maximum(count, 1)
    mean = jax.tree.map(lambda a, b: a + (b - a) * share, one.mean, other.mean)
    squares = jax.tree.map(
        lambda p, q, a, b: p + q + (b - a) ** 2 * one.count * share, one.squares, other.squares, one.mean, other.mean
    )
    return Spread(count, mean, squares)


def report_spread(spread: Spread) -> dict[str, dict[str, jax.Array]]:
    """Per leaf path: `VAR` (Eq 9, an array), `V_c` (Eq 10, sum), `V_c_mean` (Geyer et al. 2017), `U_s` (Eq 11)."""
    report = {}
    means = jax.tree.leaves(spread.mean)
    for (path, squares), mean in zip(jax.tree_util.tree_leaves_with_path(spread.squares), means, strict=True):
        variance = squares / jnp.maximum(spread.count, 1)
        report[jax.tree_util.keystr(path, simple=True, separator="/")] = {
            "VAR": variance,
            "V_c": variance.sum(),
            "V_c_mean": variance.mean(),
            "U_s": (mean**2).mean(),
        }
    return report
