"""The Laplace mechanism on each hospital's own update (Kumar et al. 2020, Eq 14-16): pure local privacy.

    release_h = clip_1(update_h, S1) + Lap(2 S1 / epsilon)   for every coordinate

Two updates clipped to L1 norm S1 differ by at most 2 S1, so one release is (epsilon, 0) locally differentially
private: unit hospital, relation replace-one, against whoever receives it, the server included. T releases cost
T epsilon. Sampling hospitals amplifies nothing here: the server sees who answered. Off by default: the noise
of d coordinates grows with d while the clipped update does not.
"""

import functools
import math
import operator
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from capsfl.privacy.accounting import Account
from capsfl.privacy.events import PrivacyError, SampledGaussian
from capsfl.privacy.noise import standard_laplace

Tree = TypeVar("Tree")

_EXAMPLE_DIMENSION = 1_000_000


def clip_by_l1_norm(update: Tree, clip_norm: ArrayLike) -> tuple[Tree, Array]:
    """Scales a whole update to L1 norm at most S1, and returns it with the float32 norm before.

    All leaves count together. As in `clip_by_global_norm`, an update at most S1 comes back bit for bit, one that
    is not finite comes back as zeros, and narrow leaves are widened to float32.
    """
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32)), update)
    sums = [jnp.sum(jnp.abs(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(wide)]
    norm = functools.reduce(operator.add, sums, jnp.float32(0))
    bound = jnp.asarray(clip_norm, jnp.float32)
    scale = bound / jnp.maximum(norm, bound)

    def clip(leaf: Array) -> Array:
        return jnp.where(jnp.isfinite(norm), leaf * scale.astype(leaf.dtype), jnp.zeros_like(leaf))

    return jax.tree.map(clip, wide), norm


def release_laplace(update: Tree, *, key: Array, clip_norm: ArrayLike, local_epsilon: ArrayLike) -> tuple[Tree, Array]:
    """Returns what a hospital hands over, `clip_1(update, S1) + Lap(2 S1 / epsilon)`, and its L1 norm before.

    Guarantee: (epsilon, 0) local differential privacy of the returned tree, unit hospital, relation replace-one,
    in real arithmetic. The norm is the hospital's own: never release it. A hospital that takes no part must be
    masked outside, for zeros come back as noise.

    Args:
        update: floating-point arrays of any shapes.
        key: a key used for nothing else, new for every hospital and round.
        clip_norm: S1 > 0, a bound on the sum of absolute values over the whole tree.
        local_epsilon: the epsilon of this one release.
    """
    clipped, norm = clip_by_l1_norm(update, clip_norm)
    scale = 2 * jnp.asarray(clip_norm, jnp.float32) / jnp.asarray(local_epsilon, jnp.float32)
    leaves, structure = jax.tree.flatten(clipped)
    noisy = [
        leaf + scale.astype(leaf.dtype) * standard_laplace(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, noisy), norm


def refuse_l2(*, clip_norm: float, local_epsilon: float) -> PrivacyError:
    """Returns the refusal of Laplace noise on an L2-clipped update, with its arithmetic."""
    root = math.sqrt(_EXAMPLE_DIMENSION)
    return PrivacyError(
        "clip_kind",
        "l2",
        f"an update clipped to L2 norm S has L1 sensitivity 2 S sqrt(d): at d = {_EXAMPLE_DIMENSION:,}, "
        f"S = {clip_norm:g} and epsilon = {local_epsilon:g} the noise has scale "
        f"{2 * clip_norm * root / local_epsilon:g} against coordinates of rms {clip_norm / root:g}; "
        'use "l1", or mechanism "gaussian"',
    )


def laplace_epsilon(local_epsilon: float, *, rounds: int) -> float:
    """Returns the epsilon of `rounds` releases of one hospital, at delta 0."""
    return rounds * local_epsilon


def laplace_account(mechanism: SampledGaussian, *, local_epsilon: float, rounds: int) -> Account:
    """Returns the account of a hospital that answers in each of `rounds` rounds.

    Args:
        mechanism: gives the sampler and its sizes, for the record; they do not lower the epsilon.
        local_epsilon: of one release.
        rounds: T.
    """
    return Account(
        epsilon=laplace_epsilon(local_epsilon, rounds=rounds),
        delta=0.0,
        relation="replace_one",
        accountant="composition of pure local releases (Laplace)",
        library="sum of the releases",
        sampler=mechanism.sampler,
        hospitals=mechanism.hospitals,
        cohort=mechanism.cohort,
        truncation=mechanism.truncation,
        noise_multiplier=0.0,
        rounds=rounds,
        beside_epsilon=local_epsilon,
        beside_relation="replace_one",
        beside_accountant="one release (Laplace, scale 2 S1 / epsilon)",
        remark="local: holds against the server where hospitals draw their own noise, not in this simulation, whose "
        "root key draws all; amplification by sampling is not claimed",
    )
