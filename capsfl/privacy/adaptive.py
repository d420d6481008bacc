"""Clip norms that follow the hospitals: a private quantile (Andrew et al. 2021), or Geyer's median, not accounted.

    b~ = (1/m) [ sum_h (b_h - 1/2) + N(0, bit_noise^2) ] + 1/2,    b_h = [ |update_h| <= C ]
    C <- C exp(-learning_rate (b~ - target_quantile))

A bit less 1/2 moves its sum by at most 1/2, so its noise has multiplier 2 bit_noise. Releasing both it and the sum
of updates costs what one Gaussian release at noise multiplier z costs when the updates carry the larger

    z_delta = (z^-2 - (2 bit_noise)^-2)^(-1/2)

(Andrew, Thakkar, McMahan & Ramaswamy 2021, Theorem 1.) Replacing a hospital doubles both sensitivities and leaves
the relation as it is. Everything here takes traced scalars: studies with their own C, z and bit noise are vmapped.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from capsfl.privacy.events import PrivacyError
from capsfl.privacy.noise import standard_normal


def default_bit_noise(*, expected_cohort: float, noise_multiplier: float) -> float:
    """Returns m/20 (Andrew et al. 2021), or z where that is more: z_delta is then at most 1.16 z."""
    return max(expected_cohort / 20, noise_multiplier)


def check_bit_noise(bit_noise: float, *, noise_multiplier: float) -> None:
    """Refuses noise on the bits that alone costs more than the whole budget of z.

    Raises:
        PrivacyError: `bit_noise` is at most z/2, so no noise on the updates keeps the total at z.
    """
    if bit_noise <= noise_multiplier / 2:
        remedy = (
            f"must be above half the noise multiplier ({noise_multiplier / 2:g}), or the bits alone cost the whole "
            "epsilon; raise it, or leave it out"
        )
        raise PrivacyError("bit_noise", bit_noise, remedy)


def update_multiplier(noise_multiplier: ArrayLike, bit_noise: ArrayLike) -> Array:
    """Returns z_delta, the noise multiplier of the updates at which updates and bits together cost z.

    Args:
        noise_multiplier: z, what the accountant is told; 0 stays 0.
        bit_noise: standard deviation of the noise on the sum of bits, above z/2.

    Raises:
        PrivacyError: both are concrete and `bit_noise` is at most z/2 > 0. Traced ones give NaN instead, which no
            training survives: check on the host, as `PrivacyPlan.build` does.
    """
    if not isinstance(noise_multiplier, Tracer) and not isinstance(bit_noise, Tracer):
        # NumPy, because inside jit jnp would trace these numbers too.
        for z, deviation in np.broadcast(np.asarray(noise_multiplier), np.asarray(bit_noise)):
            if z > 0:
                check_bit_noise(float(deviation), noise_multiplier=float(z))
    multiplier = jnp.asarray(noise_multiplier, jnp.float32)
    double = 2 * jnp.asarray(bit_noise, jnp.float32)
    quiet = multiplier == 0
    # z / sqrt(1 - (z / 2 bit_noise)^2): the same, without dividing by z.
    share = jnp.square(multiplier / jnp.where(quiet, 1, double))
    return jnp.where(quiet, 0, multiplier / jnp.sqrt(jnp.where(share < 1, 1 - share, jnp.nan)))


def centred_bit(norm: ArrayLike, clip_norm: ArrayLike) -> Array:
    """Returns b - 1/2 of a hospital, float32: 1/2 where its norm is at most C, else -1/2, a NaN norm included.

    A hospital that does not take part contributes 0 instead: mask it before the sum.
    """
    return jnp.where(jnp.asarray(norm) <= jnp.asarray(clip_norm), jnp.float32(0.5), jnp.float32(-0.5))


def quantile_update(
    clip_norm: ArrayLike,
    bit_sum: ArrayLike,
    *,
    expected_cohort: ArrayLike,
    key: Array,
    bit_noise: ArrayLike,
    target_quantile: ArrayLike,
    learning_rate: ArrayLike,
) -> Array:
    """Returns the clip norm of the next round, one geometric step towards the quantile of the update norms.

    Guarantee: with the updates at `update_multiplier(z, bit_noise)`, the round costs what z costs, hospital-level,
    under the relation of the sampler.

    Args:
        clip_norm: C > 0 of this round.
        bit_sum: sum of `centred_bit` over the hospitals that took part.
        expected_cohort: m, fixed and public, never the realised cohort.
        key: a key used for nothing else, new in every round.
        bit_noise: standard deviation of the noise on `bit_sum`.
        target_quantile: the fraction of hospitals whose update C should leave whole.
        learning_rate: of the exponent.
    """
    noise = jnp.asarray(bit_noise, jnp.float32) * standard_normal(key, 1)[0]
    cohort = jnp.asarray(expected_cohort, jnp.float32)
    fraction = (jnp.asarray(bit_sum, jnp.float32) + noise) / cohort + 0.5
    step = jnp.asarray(learning_rate, jnp.float32) * (fraction - jnp.asarray(target_quantile, jnp.float32))
    return jnp.asarray(clip_norm, jnp.float32) * jnp.exp(-step)


def median_norm(norms: Array, mask: Array, *, otherwise: ArrayLike) -> Array:
    """Returns the median update norm of a cohort (Geyer et al. 2017): NOT private, and never accounted.

    Args:
        norms: `(slots,)` L2 norms before clipping; those that are not finite are left out.
        mask: `(slots,)` bool, True where a hospital took part.
        otherwise: the clip norm of a round in which nobody took part.
    """
    present = mask & jnp.isfinite(norms)
    median = jnp.nanmedian(jnp.where(present, norms, jnp.nan))
    # A median of 0 (nobody moved) would clip everything to nothing and leave nothing to divide by.
    return jnp.where(median > 0, median, jnp.asarray(otherwise, norms.dtype))
