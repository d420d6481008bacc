"""A task, its hospitals and the privacy plan bound into rounds that can be run, saved and run again."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from capsfl.federated import diagnostics
from capsfl.federated.aggregation import AggregationConfig, make_rule, make_secure_sum, make_voting_rule
from capsfl.federated.batch_norm import make_batch_norm, own_statistics, start_statistics, starting_weights
from capsfl.federated.chunks import Choice, CompiledRound, choose_chunk, unmeasured_choice
from capsfl.federated.devices import CohortProgram, DevicesConfig, on_one_device
from capsfl.federated.hospitals import Hospitals, HospitalSource
from capsfl.federated.local import LocalConfig, make_schedule
from capsfl.federated.patients import plan_of_task
from capsfl.federated.private_local import local_update_of
from capsfl.federated.round import CohortRecords, Controls, RoundMetrics, RoundState, Setting
from capsfl.federated.scoring import score_hospitals
from capsfl.federated.server import ServerConfig, make_server_optimizer
from capsfl.federated.stored import StoredHospitals
from capsfl.federated.updates import CohortUpdates
from capsfl.federated.votes import Votes
from capsfl.learning.tasks import Task, trainable
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.plan import PrivacyConfig, PrivacyPlan
from capsfl.privacy.secret import fingerprint_key, root_key
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
    batch_norm: Literal["average", "local"] = "average"
    """Running statistics of batch normalisation: averaged over the cohort as the weights are, which noise forbids, or
    every hospital's own. Without effect on a model that has none."""
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
        dropped: members who trained and then were not heard of.
        clip_norm: S of the round: configured, or where it follows the hospitals, what it had become.
        votes: under `mae_votes`, the mean absolute error that each member (outer name) found in another's model.
        vote_weights: the share of each member's model in the mean that the votes gave it.
        updates: what each member handed over; None unless the federation keeps it.
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
    dropped: tuple[str, ...] = ()
    votes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    vote_weights: Mapping[str, float] = field(default_factory=dict)
    updates: CohortUpdates | None = None


class _Draw(NamedTuple):
    """The cohort of a round as it was drawn: hospitals `(cohort,)`, and who of them takes part."""

    indices: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class _Layout:
    """A cohort as a program has it: where each drawn hospital lies, and whose records are read there."""

    positions: np.ndarray
    indices: np.ndarray
    counts: np.ndarray

    @property
    def name(self) -> bytes:
        return self.indices.tobytes() + self.counts.tobytes()


def draws_noise(privacy: PrivacyConfig) -> bool:
    """Tells whether rounds under this section draw noise."""
    return privacy.noise_multiplier > 0 or privacy.local_epsilon is not None


def root_name(
    stream: str, task: str, config: RoundsConfig, privacy: PrivacyConfig, patients: Sequence[tuple[str, int]] = ()
) -> str:
    """Returns the name that the random draws of a task's rounds are derived from, beside seed or secret.

    Tasks and runs of one seed must not share noise: the accountant adds them up as independent, and of two releases
    that differ in z alone the noise could be eliminated. So the name of rounds with noise holds their configuration,
    and the numbers of patients that their epsilons rest on: a run does not resume with others.
    """
    name = f"{stream}/{task}"
    if not draws_noise(privacy):
        return name
    settings = [config.model_dump(mode="json"), privacy.model_dump(mode="json"), *([patients] if patients else [])]
    return f"{name}/{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()}"


class Federation:
    """Runs federated rounds of one task over hospitals.

    Every random draw is folded from `(seed, stream, task, round, hospital)`, so a round can be run again from its
    state alone. On another device layout or with another L it agrees within float32 reassociation; with the same
    `chunk` it is the same bit for bit. Where `devices.chunk` is absent the first round chooses it (`choice`): whoever
    resumes a run hands it on.

    Hospitals that lie on disk are read one cohort at a time, that of the next round while this one trains.

    Args:
        task: what is trained.
        hospitals: the records, in memory or in a store.
        config: rounds, local and server optimizers.
        privacy: sampler, clip norm and noise.
        devices: where the cohort runs.
        seed: seed of every draw; whoever knows it can subtract the noise.
        secret: of the run, drawn from in the seed's place under privacy.noise_key "secret".
        stream: name of the run, so that runs of one seed draw independently; tasks of a run do so by their names.
        plan: of the whole run, where it has other tasks too; that of this task alone when absent.
        keep_updates: whether reports hold what each hospital handed over, at the price of a model for every slot.
    """

    def __init__(
        self,
        task: Task,
        hospitals: HospitalSource,
        *,
        config: RoundsConfig,
        privacy: PrivacyConfig,
        devices: DevicesConfig = DevicesConfig(),
        seed: int = 0,
        stream: str = "",
        secret: bytes | None = None,
        plan: PrivacyPlan | None = None,
        keep_updates: bool = False,
    ) -> None:
        self.task = task
        self.hospitals = hospitals
        self.plan = plan or plan_of_task(
            task.name, hospitals, privacy, rounds=config.rounds, epochs=config.local.epochs
        )
        if (privacy.noise_key == "secret") != (secret is not None):
            raise PrivacyError("privacy.noise_key", privacy.noise_key, "needs a secret, and only then takes one")
        patients = () if self.plan.patients is None else self.plan.stage(task.name).patients
        name = root_name(stream, task.name, config, privacy, patients)
        self.key = root_key(seed=seed, name=name, secret=secret)
        self.fingerprint = fingerprint_key(seed=seed, name=name, secret=secret)
        if config.scaffold and (self.plan.noises_sum or privacy.local_epsilon is not None):
            raise PrivacyError(
                "scaffold",
                "true",
                "control variates leave the hospitals un-noised, so no epsilon would hold; switch it off, or "
                "leave privacy.noise_multiplier and privacy.local_epsilon out",
            )
        if config.scaffold and isinstance(hospitals, StoredHospitals):
            raise ValueError(
                f"scaffold = true: keeps a copy of the model for each of {len(hospitals)} hospitals in memory, while "
                "their records are read from disk; switch it off, or keep the records in memory"
            )
        self._server_optimizer = functools.partial(make_server_optimizer, config.server)
        self._config = config
        self._devices = devices
        local_update = local_update_of(task, config.local, self.plan)
        self._batch_norm = make_batch_norm(config.batch_norm, task, self.plan, config.aggregation)
        self._make_program = functools.partial(
            CohortProgram,
            local_update,
            self._server_optimizer,
            self.plan,
            rule=make_rule(config.aggregation, self.plan),
            spread=config.diagnostics,
            secure=make_secure_sum(
                config.aggregation,
                self.plan,
                trainable(task.parameters),
                scaffold=config.scaffold,
                diagnostics=config.diagnostics,
            ),
            voting=make_voting_rule(config.aggregation, self.plan, task),
            dropout=config.aggregation.dropout,
            keep_updates=keep_updates,
            batch_norm=self._batch_norm,
            schedule=make_schedule(config.local, rounds=config.rounds),
        )
        self._program = self._make_program(config=devices)
        self._choice = unmeasured_choice(self._program, given=devices.chunk is not None)
        self._setting = Setting(
            clip_norm=jnp.float32(self.plan.sum_clip_norm),
            noise_multiplier=jnp.float32(self.plan.sum_multiplier),
            local_rate=jnp.float32(config.local.learning_rate),
            server_rate=jnp.float32(config.server.learning_rate),
        )
        before = self.plan.rounds_before(task.name)
        self._sample = jax.jit(lambda key, number: self.plan.sample(key=key, number=before + number))
        self._evaluate = jax.jit(functools.partial(score_hospitals, task), static_argnames="batch_size")
        self._draws: dict[int, _Draw] = {}
        self._placed: tuple[bytes, CohortRecords] | None = None

    @property
    def choice(self) -> Choice | None:
        """L and why; None before the first round where it is still to be chosen."""
        return self._choice

    def init(self) -> RoundState:
        """Returns the state before the first round."""
        # Through NumPy, since a weakly typed weight would have the second round compiled again.
        parameters = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), self.task.parameters)
        weights = trainable(parameters)
        server = self._server_optimizer(self._setting.server_rate).init(weights)
        controls = None
        if self._config.scaffold:
            zeros = jax.tree.map(jnp.zeros_like, weights)
            number = len(self.hospitals)
            controls = Controls(zeros, jax.tree.map(lambda leaf: jnp.zeros((number, *leaf.shape), leaf.dtype), zeros))
        clip_norm = self._setting.clip_norm if self.plan.config.clipping == "quantile" else None
        noise = None if self.plan.correlated is None else self.plan.correlated.init(weights)
        statistics = start_statistics(self._batch_norm, parameters, len(self.hospitals))
        return self.place(RoundState(parameters, server, jnp.int32(0), controls, clip_norm, noise, statistics))

    def place(self, state: RoundState) -> RoundState:
        """Puts a state, new or restored, on the devices."""
        return self._program.replicate(state)

    def step(self, state: RoundState) -> tuple[RoundState, RoundReport]:
        """Runs the next round.

        Raises:
            HospitalStoreError: a hospital of the cohort, or of the next one, cannot be read from its store.
        """
        number = int(state.round)
        # Drawn before the round is dispatched, since a device runs what it is given in order.
        cohort, upcoming = self._draw(number), self._draw(number + 1)
        self._draws = {number + 1: upcoming}
        if self._choice is None and (number > 0 or not cohort.mask.any()):
            # What a resumed run would choose now need not be what it had chosen.
            self._choice = Choice(
                self._program.chunk, "nothing to measure in the first round: the rule of the platform"
            )
        if self._choice is None:
            state, metrics, layout = self._first_round(state, number, cohort)
        else:
            layout = self._lay_out(self._program, cohort)
            placed = self._place(self._program, layout)
            state, metrics = self._program.dispatch(state, placed, self._setting, self._round_key(number))
        ahead = self._lay_out(self._program, upcoming)
        if number + 1 < self._config.rounds and ahead.name != layout.name:
            self.hospitals.prefetch(ahead.indices, (ahead.counts > 0) & self._program.own)
        metrics = self._program.collect(metrics)
        slots = jax.tree.map(lambda leaf: leaf[layout.positions], metrics.slots)
        names = [self.hospitals.names[int(i)] for i in cohort.indices]
        present = np.flatnonzero(cohort.mask).tolist()
        losses = {names[slot]: float(slots.loss[slot]) for slot in present}
        return state, RoundReport(
            round=number + 1,
            cohort=tuple(names[slot] for slot in present),
            loss=float(np.mean(list(losses.values()))) if losses else None,
            hospital_loss=losses,
            update_norm={names[slot]: float(slots.update_norm[slot]) for slot in present},
            not_finite=tuple(names[slot] for slot in present if not np.isfinite(slots.update_norm[slot])),
            clip_norm=float(metrics.clip_norm) if self.plan.patients is None else self.plan.config.clip_norm,
            spread={} if metrics.spread is None else _layers(metrics.spread),
            dropped=tuple(names[slot] for slot in present if not slots.arrived[slot]),
            updates=None
            if metrics.updates is None
            else CohortUpdates(metrics.updates, {names[slot]: int(layout.positions[slot]) for slot in present}),
            **_named_votes(metrics.votes, layout.positions, names),
        )

    def _first_round(self, state: RoundState, number: int, cohort: _Draw) -> tuple[RoundState, RoundMetrics, _Layout]:
        """Runs a round and chooses L on the way."""
        arguments = (self._setting, self._round_key(number))
        batch_size = self._config.local.batch_size
        layouts: dict[int, _Layout] = {}

        def prepare(chunk: int) -> CompiledRound:
            program = self._make_program(config=self._devices.model_copy(update={"chunk": chunk}))
            layouts[chunk] = self._lay_out(program, cohort)
            placed = self._place(program, layouts[chunk])
            return CompiledRound.of(program, state, placed, *arguments, batch_size=batch_size)

        counts = np.where(cohort.mask, self.hospitals.counts[cohort.indices], 0)
        best, outcome, self._choice = choose_chunk(
            prepare,
            self._program.devices,
            num_slots=self.plan.num_slots,
            memory_fraction=self._devices.memory_fraction,
            rounds=self._config.rounds,
            batches=counts.sum() / max(1, np.minimum(counts, batch_size).sum()),
        )
        self._program, layout = best.program, layouts[best.program.chunk]
        self._placed = (layout.name, best.cohort)
        return *outcome, layout

    def weights_of(self, state: RoundState, hospital: str) -> Any:
        """Returns the weights that a hospital works with: the server's, with its own statistics where it has some.

        A hospital that has not taken part has none, and takes the server's copy.
        """
        names = list(self.hospitals.names)
        if state.statistics is None or hospital not in names:
            return state.parameters
        return starting_weights(state.parameters, state.statistics, names.index(hospital))

    def evaluate(self, weights: Any, hospitals: Hospitals, *, batch_size: int = 16) -> dict[str, dict[str, float]]:
        """Scores weights, or the state of a round, on held-out records.

        Args:
            weights: of the model; or a state, whose hospitals are each scored by `weights_of`.
            hospitals: the records.
            batch_size: records of one forward pass.

        Returns:
            `{hospital: {score: value}}`, undefined scores left out.
        """
        parameters, statistics = weights, None
        if isinstance(weights, RoundState):
            parameters = weights.parameters
            known, own = self.hospitals.names, on_one_device(weights.statistics)
            statistics = own_statistics(on_one_device(parameters), own, known, hospitals.names)
        scores = self._evaluate(
            on_one_device(parameters),
            hospitals.records,
            hospitals.counts,
            batch_size=batch_size,
            statistics=statistics,
        )
        result: dict[str, dict[str, float]] = {name: {} for name in hospitals.names}
        for score, (numerator, denominator) in scores.items():
            for name, top, bottom in zip(hospitals.names, np.asarray(numerator), np.asarray(denominator), strict=True):
                if bottom > 0:
                    result[name][score] = float(top / bottom)
        return result

    def _round_key(self, number: int) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(self.key, number), 1)

    def _draw(self, number: int) -> _Draw:
        """The cohort of the round after `number` rounds."""
        if number in self._draws:
            return self._draws[number]
        cohort = self._sample(jax.random.fold_in(jax.random.fold_in(self.key, number), 0), number)
        indices = np.asarray(cohort.indices)
        # A place that no hospital has taken is drawn, and is nobody.
        return _Draw(indices, np.asarray(cohort.mask) & (np.asarray(self.hospitals.counts)[indices] > 0))

    def _lay_out(self, program: CohortProgram, cohort: _Draw) -> _Layout:
        counts = np.where(cohort.mask, self.hospitals.counts[cohort.indices], 0).astype(np.int32)
        order = program.arrange(counts)
        positions = np.argsort(order, kind="stable")[: len(counts)]
        # An empty slot is nobody's: hospital 0 with no records.
        indices, counts = np.append(cohort.indices, 0).astype(np.int32), np.append(counts, 0)
        return _Layout(positions, indices[order], counts[order])

    def _place(self, program: CohortProgram, layout: _Layout) -> CohortRecords:
        """Puts the cohort's records on the devices, keeping them there while the cohort stays the same."""
        if self._placed is None or self._placed[0] != layout.name:
            self._placed = None  # gives the last cohort's memory back before the next one is put there
            records = self.hospitals.take(layout.indices, (layout.counts > 0) & program.own)
            cohort: Any = (records, layout.counts, layout.indices)
            self._placed = (layout.name, program.place(CohortRecords(*cohort)))
        return self._placed[1]


def _named_votes(votes: Votes | None, positions: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Votes and weights by the names of voter and model; what is not there is left out."""
    if votes is None:
        return {}
    errors, weights = np.asarray(votes.errors)[np.ix_(positions, positions)], np.asarray(votes.weights)[positions]
    found = {
        voter: {model: float(error) for model, error in zip(names, row, strict=True) if np.isfinite(error)}
        for voter, row in zip(names, errors, strict=True)
    }
    return {
        "votes": {voter: row for voter, row in found.items() if row},
        "vote_weights": {name: float(weight) for name, weight in zip(names, weights, strict=True) if weight > 0},
    }


def _layers(spread: diagnostics.Spread) -> dict[str, dict[str, float]]:
    """Per layer the scalars of Eq 10 and 11."""
    report = diagnostics.report_spread(spread)
    return {
        layer: {name: float(value) for name, value in figures.items() if name != "VAR"}
        for layer, figures in report.items()
    }
