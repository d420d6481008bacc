"""One federated round: local training, clip, sum, noise, server step, in one compiled program.

    w_{t+1} = ServerOpt(w_t, (1/m) [sum_h clip_S(w_h - w_t) + N(0, z² S² I)])

(Kumar et al. 2020, Eq 8, after Geyer, Klein & Nabi 2017.) The cohort's slots are cut into chunks of L hospitals;
a chunk is vmapped and chunks are scanned, so activations grow with L and not with the cohort. The same body runs
on one device and, with an axis name, on each of several.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from capsfl.federated.local import LocalResult
from capsfl.privacy.clipping import clip_by_global_norm
from capsfl.privacy.mechanisms import mean_with_noise
from capsfl.privacy.plan import PrivacyPlan


class RoundState(NamedTuple):
    """What crosses rounds.

    Attributes:
        parameters: the server's weights.
        server: state of the server optimizer.
        round: scalar int32, rounds finished.
    """

    parameters: Any
    server: Any
    round: jax.Array


class CohortRecords(NamedTuple):
    """The cohort on the devices; every leaf leads with the slot axis.

    Attributes:
        records: pytree `(slots, records, ...)`.
        counts: `(slots,)` int32; 0 marks an empty slot, which trains nothing and adds nothing.
        hospitals: `(slots,)` int32 index of the hospital, from which its random key is derived.
    """

    records: Any
    counts: jax.Array
    hospitals: jax.Array


class Mechanism(NamedTuple):
    """The traced scalars of the privacy mechanism, so one program serves every setting of a study.

    Attributes:
        clip_norm: S, the L2 bound on a hospital's whole update.
        noise_multiplier: z, standard deviation of the noise on the sum in units of S.
    """

    clip_norm: jax.Array
    noise_multiplier: jax.Array


class SlotMetrics(NamedTuple):
    """Un-noised figures per slot `(slots,)`: for the run's own log, never for the ledger.

    Attributes:
        loss: mean training loss.
        update_norm: L2 norm before clipping; NaN or infinity where the update was discarded for holding one.
    """

    loss: jax.Array
    update_norm: jax.Array


def make_round(
    local_update: Callable[..., LocalResult],
    server_optimizer: optax.GradientTransformation,
    plan: PrivacyPlan,
    *,
    chunk: int,
    axis_name: str | None = None,
) -> Callable[..., tuple[RoundState, SlotMetrics]]:
    """Builds the body of a round.

    Args:
        local_update: `(parameters, records, count, key=...) -> LocalResult` of one hospital.
        server_optimizer: applied to minus the noised mean update.
        plan: gives m, the fixed divisor of the sum.
        chunk: L, hospitals trained at once; divides the slots a device holds.
        axis_name: device axis over which the clipped updates are summed; None on one device.

    Returns:
        `(state, cohort, mechanism, key) -> (state, metrics)`. `key` is the round's key, the same on every device:
        hospital keys are folded from it, and every device adds the same noise to the same sum.
    """

    def round_body(
        state: RoundState, cohort: CohortRecords, mechanism: Mechanism, key: jax.Array
    ) -> tuple[RoundState, SlotMetrics]:
        local_key, noise_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)

        def train_one(records: Any, count: jax.Array, hospital: jax.Array) -> tuple[Any, SlotMetrics]:
            result = local_update(state.parameters, records, count, key=jax.random.fold_in(local_key, hospital))
            clipped, norm = clip_by_global_norm(result.update, mechanism.clip_norm)
            return clipped, SlotMetrics(result.loss, norm)

        def add_chunk(total: Any, part: CohortRecords) -> tuple[Any, SlotMetrics]:
            if chunk == 1:
                # A batch of one would only cost compile time, and turn convolutions into grouped ones.
                alone = train_one(*jax.tree.map(lambda leaf: leaf[0], part))
                clipped, metrics = jax.tree.map(lambda leaf: leaf[None], alone)
            else:
                clipped, metrics = jax.vmap(train_one)(*part)
            return jax.tree.map(lambda t, c: t + c.sum(0), total, clipped), metrics

        chunks = jax.tree.map(lambda leaf: leaf.reshape(-1, chunk, *leaf.shape[1:]), cohort)
        zero = jax.tree.map(jnp.zeros_like, state.parameters)
        total, metrics = jax.lax.scan(add_chunk, zero, chunks)
        metrics = jax.tree.map(lambda leaf: leaf.reshape(-1), metrics)
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)
        mean = mean_with_noise(
            total,
            plan=plan,
            key=noise_key,
            clip_norm=mechanism.clip_norm,
            noise_multiplier=mechanism.noise_multiplier,
        )
        pseudo_gradient = jax.tree.map(jnp.negative, mean)
        updates, server = server_optimizer.update(pseudo_gradient, state.server, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        return RoundState(parameters, server, state.round + 1), metrics

    return round_body
