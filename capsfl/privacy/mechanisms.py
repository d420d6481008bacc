"""The Gaussian mechanism on a sum of clipped updates (paper Eq 8; Geyer, Klein and Nabi 2017).

    release = (1/m) [ sum of clipped updates + N(0, z^2 S^2 I) ]

The noise goes on the sum and m is the expected cohort, never the realised one, so the released mean carries
noise of standard deviation exactly zS/m, and adding or removing a hospital moves it by at most S/m. The paper
prints Eq 8 with standard deviation sigma S after the division, which is this mechanism with z = sigma m, and
describes a variance S^2 sigma^2 / m, which is this mechanism with z = sigma sqrt(m).
"""

import itertools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from capsfl.privacy.noise import standard_normal
from capsfl.privacy.plan import PrivacyPlan

Tree = TypeVar("Tree")


def add_gaussian(sum_tree: Tree, *, key: Array, standard_deviation: ArrayLike) -> Tree:
    """Adds independent N(0, standard_deviation^2) noise to every element of every leaf.

    All leaves share one draw, cut up in tree order, so the noise depends on the key and the shapes alone: not on
    devices, chunks or how the sum was formed. A deviation of 0 returns the values unchanged.

    Args:
        sum_tree: Floating-point arrays of any shapes.
        key: A key used for nothing else, new in every round: reusing one cancels the noise between rounds.
        standard_deviation: At least 0, a float or a traced scalar.
    """
    leaves, structure = jax.tree.flatten(sum_tree)
    sizes = [leaf.size for leaf in leaves]
    widest = jnp.result_type(*leaves)
    # One draw, not one a leaf: each costs half a second to compile, and a network has dozens of leaves.
    draw = jnp.asarray(standard_deviation, widest) * standard_normal(key, sum(sizes), widest)
    parts = jnp.split(draw, list(itertools.accumulate(sizes))[:-1])
    noisy = [leaf + part.reshape(leaf.shape).astype(leaf.dtype) for leaf, part in zip(leaves, parts, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def mean_with_noise(
    clipped_sum: Tree,
    *,
    plan: PrivacyPlan,
    key: Array,
    clip_norm: ArrayLike | None = None,
    noise_multiplier: ArrayLike | None = None,
) -> Tree:
    """Returns the released mean `(sum + N(0, (zS)^2 I)) / m`: noise of standard deviation exactly zS/m.

    Guarantee: `plan.statement(rounds)`, hospital-level, if each hospital's part of `clipped_sum` was clipped
    to S, its cohort came from `plan.sample`, and S and z are the plan's.

    Args:
        clipped_sum: Sum over the cohort of updates clipped to `clip_norm`.
        plan: Gives m, and S and z where those are not passed.
        key: A key used for nothing else, new in every round.
        clip_norm: S, where it is traced (a sweep); None takes the plan's.
        noise_multiplier: z, where it is traced (a sweep); None takes the plan's. The epsilon of a study is
            that of a plan with its own z. Under quantile clipping pass `adaptive.update_multiplier`.
    """
    bound = jnp.asarray(plan.config.clip_norm if clip_norm is None else clip_norm, jnp.float32)
    multiplier = plan.update_multiplier if noise_multiplier is None else noise_multiplier
    deviation = jnp.asarray(multiplier, jnp.float32) * bound
    noisy = add_gaussian(clipped_sum, key=key, standard_deviation=deviation)
    return jax.tree.map(lambda leaf: leaf / jnp.asarray(plan.expected_cohort, leaf.dtype), noisy)


def mean_with_banded_noise(
    clipped_sum: Tree,
    state: Any,
    *,
    plan: PrivacyPlan,
    key: Array,
    clip_norm: ArrayLike,
    noise_multiplier: ArrayLike,
) -> tuple[Tree, Any]:
    """Returns the released mean under banded noise, and the noise state of the next round.

    Guarantee: as `mean_with_noise`, for all rounds of the task together, with S and z the same in all of them.

    Args:
        clipped_sum: Sum over the cohort of updates clipped to `clip_norm`.
        state: of `plan.correlated.init`, or of the round before.
        plan: Gives m and the strategy.
        key: A key used for nothing else, new in every round.
        clip_norm: S.
        noise_multiplier: z.
    """
    assert plan.correlated is not None
    deviation = jnp.asarray(noise_multiplier, jnp.float32) * jnp.asarray(clip_norm, jnp.float32)
    noise, state = plan.correlated.next(state, key=key, standard_deviation=deviation, like=clipped_sum)
    cohort = plan.expected_cohort
    return jax.tree.map(lambda s, n: (s + n) / jnp.asarray(cohort, s.dtype), clipped_sum, noise), state
