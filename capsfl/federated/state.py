"""What a round takes and gives: the state that crosses rounds, the cohort, a study's scalars, un-noised figures."""

from typing import Any, NamedTuple

import jax

from capsfl.federated.diagnostics import Spread
from capsfl.federated.votes import Votes


class Controls(NamedTuple):
    """Control variates of SCAFFOLD (Karimireddy et al. 2020).

    Attributes:
        server: c, pytree like the parameters.
        hospitals: c_h of every hospital, leaves `(hospitals, ...)`: as much memory as all their models.
    """

    server: Any
    hospitals: Any


class RoundState(NamedTuple):
    """What crosses rounds.

    Attributes:
        parameters: the server's weights.
        server: state of the server optimizer.
        round: scalar int32, rounds finished.
        controls: of SCAFFOLD, else None.
        clip_norm: scalar, the S of the next round where it follows a quantile of the update norms, else None.
        noise: of the rounds that banded noise has still to cancel, `(bands - 1, ...)` on every leaf, else None.
        statistics: of batch normalisation, every hospital's own, leaves `(hospitals, ...)`, where they stay at home;
            else None.
    """

    parameters: Any
    server: Any
    round: jax.Array
    controls: Controls | None = None
    clip_norm: jax.Array | None = None
    noise: Any = None
    statistics: Any = None


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


class Setting(NamedTuple):
    """The traced scalars of a study, so one program serves every setting of a sweep.

    Attributes:
        clip_norm: S, the L2 bound on a hospital's whole update.
        noise_multiplier: z, standard deviation of the noise on the sum in units of S.
        local_rate: learning rate inside a hospital.
        server_rate: learning rate of the server.
    """

    clip_norm: jax.Array
    noise_multiplier: jax.Array
    local_rate: jax.Array
    server_rate: jax.Array


class SlotMetrics(NamedTuple):
    """Un-noised figures per slot `(slots,)`: for the run's own log, never for the ledger.

    Attributes:
        loss: mean training loss.
        update_norm: L2 norm before clipping; NaN or infinity where the update was discarded for holding one.
        arrived: bool, whether the update reached the server; not of an empty slot, nor after a drop-out.
    """

    loss: jax.Array
    update_norm: jax.Array
    arrived: jax.Array


class RoundMetrics(NamedTuple):
    """Un-noised figures of a round.

    Attributes:
        slots: per slot.
        spread: moments of the updates before clipping (Eq 9-11); None unless asked for.
        clip_norm: scalar, the S that this round clipped to.
        votes: what the cohort found in each other's models; None unless they decide.
        updates: leaves `(slots, ...)`, what each hospital handed over; None unless asked for.
    """

    slots: SlotMetrics
    spread: Spread | None
    clip_norm: jax.Array
    votes: Votes | None = None
    updates: Any = None
