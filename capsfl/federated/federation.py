"""A task, its hospitals and the privacy plan bound into rounds that can be run, saved and run again."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from capsfl.federated import diagnostics
from capsfl.federated.aggregation import AggregationConfig, make_rule
from capsfl.federated.devices import CohortProgram, DevicesConfig
from capsfl.federated.hospitals import Hospitals
from capsfl.federated.local import LocalConfig, make_local_update
from capsfl.federated.round import CohortRecords, Controls, RoundState, Setting
from capsfl.federated.server import ServerConfig, make_server_optimizer
from capsfl.learning.tasks import Task
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.plan import PrivacyConfig, PrivacyPlan
from capsfl.settings import Settings


class RoundsConfig(Settings):
    """The rounds of one task."""

    rounds: int = Field(default=10, ge=1)
    """Federated rounds."""
    local: LocalConfig = LocalConfig()
    """Training inside a hospital."""
    server: ServerConfig = ServerConfig()
    """The server's step."""
    aggregation: AggregationConfig = AggregationConfig()
    """How the cohort's updates are combined."""
    scaffold: bool = False
    """Corrects client drift by control variates (SCAFFOLD), kept for every hospital; without noise only."""
    diagnostics: bool = False
    """Logs per layer how far updates spread (Eq 9-11), un-noised, at the price of two more copies of the model."""


@dataclass(frozen=True)
class RoundReport:
    """Un-noised figures of one round, for the run's own log; never for the ledger.

    Attributes:
        round: the round just finished, from 1.
        cohort: names of the hospitals that took part.
        loss: mean training loss over the cohort; None when nobody took part.
        hospital_loss: the loss of each member of the cohort.
        update_norm: L2 norm of each member's update before clipping.
        not_finite: members whose update held NaN or infinity and was left out.
        clip_norm: S of the round: configured, or where it follows the hospitals, what it had become.
        spread: per layer V_c as sum and as mean, and U_s (Eq 10 and 11), where asked for.
    """

    round: int
    cohort: tuple[str, ...]
    loss: float | None
    hospital_loss: Mapping[str, float] = field(default_factory=dict)
    update_norm: Mapping[str, float] = field(default_factory=dict)
    not_finite: tuple[str, ...] = ()
    clip_norm: float | None = None
    spread: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Federation:
    """Runs federated rounds of one task over stacked hospitals.

    Every random draw is folded from `(seed, stream, task, round, hospital)`, so a round can be run again from its
    state alone and its outcome does not depend on chunks; on another device layout it agrees within float32
    reassociation.

    Args:
        task: what is trained.
        hospitals: the records.
        config: rounds, local and server optimizers.
        privacy: sampler, clip norm and noise.
        devices: where the cohort runs.
        seed: seed of every draw; whoever knows it can subtract the noise.
        stream: name of the run, so that runs of one seed draw independently; tasks of a run do so by their names.
    """

    def __init__(
        self,
        task: Task,
        hospitals: Hospitals,
        *,
        config: RoundsConfig,
        privacy: PrivacyConfig,
        devices: DevicesConfig = DevicesConfig(),
        seed: int = 0,
        stream: str = "",
    ) -> None:
        self.task = task
        self.hospitals = hospitals
        self.plan = PrivacyPlan.build(privacy, num_hospitals=len(hospitals))
        # Tasks and runs of one seed must not share noise: the accountant adds them up as independent.
        name = hashlib.sha256(f"{stream}/{task.name}".encode()).digest()
        self.key = jax.random.fold_in(jax.random.key(seed), int.from_bytes(name[:4], "big"))
        if config.scaffold and (privacy.noise_multiplier > 0 or privacy.local_epsilon is not None):
            raise PrivacyError(
                "scaffold",
                "true",
                "control variates leave the hospitals un-noised, so no epsilon would hold; switch it off, or "
                "leave privacy.noise_multiplier and privacy.local_epsilon out",
            )
        self._server_optimizer = functools.partial(make_server_optimizer, config.server)
        self._scaffold = config.scaffold
        self._program = CohortProgram(
            make_local_update(task, config.local),
            self._server_optimizer,
            self.plan,
            config=devices,
            rule=make_rule(config.aggregation, self.plan),
            spread=config.diagnostics,
        )
        self._setting = Setting(
            clip_norm=jnp.float32(privacy.clip_norm),
            noise_multiplier=jnp.float32(privacy.noise_multiplier),
            local_rate=jnp.float32(config.local.learning_rate),
            server_rate=jnp.float32(config.server.learning_rate),
        )
        self._sample = jax.jit(lambda key: self.plan.sample(key=key))
        self._evaluate = jax.jit(self._scores, static_argnames="batch_size")
        self._placed: tuple[bytes, CohortRecords] | None = None

    def init(self) -> RoundState:
        """Returns the state before the first round."""
        # Through NumPy, since a weakly typed weight would have the second round compiled again.
        parameters = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), self.task.parameters)
        server = self._server_optimizer(self._setting.server_rate).init(parameters)
        controls = None
        if self._scaffold:
            zeros = jax.tree.map(jnp.zeros_like, parameters)
            number = len(self.hospitals)
            controls = Controls(zeros, jax.tree.map(lambda leaf: jnp.zeros((number, *leaf.shape), leaf.dtype), zeros))
        clip_norm = self._setting.clip_norm if self.plan.config.clipping == "quantile" else None
        return self.place(RoundState(parameters, server, jnp.int32(0), controls, clip_norm))

    def place(self, state: RoundState) -> RoundState:
        """Puts a state, new or restored, on the devices."""
        return self._program.replicate(state)

    def step(self, state: RoundState) -> tuple[RoundState, RoundReport]:
        """Runs the next round."""
        key = jax.random.fold_in(self.key, state.round)
        cohort = self._sample(jax.random.fold_in(key, 0))
        indices, mask = np.asarray(cohort.indices), np.asarray(cohort.mask)
        placed = self._place(indices, mask)
        state, metrics = self._program(state, placed, self._setting, jax.random.fold_in(key, 1))
        names = [self.hospitals.names[i] for i in indices]
        present = [slot for slot in range(len(indices)) if mask[slot]]
        losses = {names[slot]: float(metrics.slots.loss[slot]) for slot in present}
        return state, RoundReport(
            round=int(state.round),
            cohort=tuple(names[slot] for slot in present),
            loss=float(np.mean(list(losses.values()))) if losses else None,
            hospital_loss=losses,
            update_norm={names[slot]: float(metrics.slots.update_norm[slot]) for slot in present},
            not_finite=tuple(names[slot] for slot in present if not np.isfinite(metrics.slots.update_norm[slot])),
            clip_norm=float(metrics.clip_norm),
            spread={} if metrics.spread is None else _layers(metrics.spread),
        )

    def evaluate(self, parameters: Any, hospitals: Hospitals, *, batch_size: int = 16) -> dict[str, dict[str, float]]:
        """Scores weights on held-out records: `{hospital: {score: value}}`, undefined scores left out."""
        scores = self._evaluate(parameters, hospitals.records, hospitals.counts, batch_size=batch_size)
        result: dict[str, dict[str, float]] = {name: {} for name in hospitals.names}
        for score, (numerator, denominator) in scores.items():
            for name, top, bottom in zip(hospitals.names, np.asarray(numerator), np.asarray(denominator), strict=True):
                if bottom > 0:
                    result[name][score] = float(top / bottom)
        return result

    def _scores(self, parameters: Any, records: Any, counts: jax.Array, *, batch_size: int) -> Any:
        capacity = jax.tree.leaves(records)[0].shape[1]
        batches = -(-capacity // batch_size)

        def one_hospital(inputs: tuple[Any, jax.Array]) -> Any:
            rows, count = inputs

            def one_batch(index: jax.Array) -> Any:
                slots = index * batch_size + jnp.arange(batch_size)
                batch = jax.tree.map(lambda leaf: leaf[jnp.minimum(slots, capacity - 1)], rows)
                return self.task.scores(parameters, batch, (slots < count).astype(jnp.float32))

            return jax.tree.map(lambda leaf: leaf.sum(0), jax.lax.map(one_batch, jnp.arange(batches)))

        return jax.lax.map(one_hospital, (records, jnp.asarray(counts)))

    def _place(self, indices: np.ndarray, mask: np.ndarray) -> CohortRecords:
        """Puts the cohort's records on the devices, keeping them there while the cohort stays the same."""
        name = indices.tobytes() + mask.tobytes()
        if self._placed is None or self._placed[0] != name:
            records = self.hospitals.take(indices)
            counts = np.where(mask, self.hospitals.counts[indices], 0)
            cohort: Any = (records, counts.astype(np.int32), indices.astype(np.int32))
            self._placed = (name, self._program.place(CohortRecords(*cohort)))
        return self._placed[1]


def _layers(spread: diagnostics.Spread) -> dict[str, dict[str, float]]:
    """Per layer the scalars of Eq 10 and 11."""
    report = diagnostics.report_spread(spread)
    return {
        layer: {name: float(value) for name, value in figures.items() if name != "VAR"}
        for layer, figures in report.items()
    }
