"""One compiled program for every study of a group.

Studies lie on a leading axis: settings, keys and states are arguments, so that learning rates, clip norms, noise
multipliers and seeds are never compiled in. A device takes a portion of `passes x width` studies; `width` of them
are vmapped, passes follow one another, and a study's rounds are a loop inside. The records are stored once and
every study reads its own cohort out of them. A study's keys, cohorts, updates and noise are those of a `Federation`
with the same configuration and seed, so its result is the same within float32 reassociation.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from capsfl.federated.aggregation import make_rule, make_secure_sum
from capsfl.federated.batch_norm import make_batch_norm, own_statistics, start_statistics
from capsfl.federated.federation import root_name
from capsfl.federated.local import LocalResult, make_schedule
from capsfl.federated.private_local import local_update_of
from capsfl.federated.round import CohortRecords, Controls, RoundState, Setting, make_round
from capsfl.federated.scoring import score_hospitals
from capsfl.federated.server import make_server_optimizer
from capsfl.learning.tasks import Scores, trainable
from capsfl.privacy.plan import PrivacyPlan
from capsfl.privacy.secret import root_key
from capsfl.sweeps.points import Point, plan_of
from capsfl.sweeps.problems import Built

AXIS = "studies"
SCORED_AT_ONCE = 256
"""Held-out records of one forward pass: few enough that scoring takes less memory than training."""


class Studies(NamedTuple):
    """What tells studies of a group apart; every leaf leads with the axes `(passes, width)`.

    Attributes:
        setting: clip norm, noise multiplier and learning rates.
        key: of the run, as `Federation` derives it from seed and task.
        cap: int32, the most hospitals a round of this study takes.
    """

    setting: Setting
    key: jax.Array
    cap: jax.Array


class Progress(NamedTuple):
    """Where studies stand; every leaf leads with the axes `(passes, width)`.

    Attributes:
        state: as it crosses rounds.
        losses: `(rounds,)` mean training loss of each round's cohort; NaN where nobody took part.
        left_out: scalar int32, updates discarded so far because they held NaN or infinity.
    """

    state: RoundState
    losses: jax.Array
    left_out: jax.Array


class Make(Protocol):
    """Builds a group's program, not yet compiled, for a width and a number of passes."""

    def __call__(self, width: int, passes: int) -> "GroupProgram": ...


class GroupProgram:
    """The program of one group of studies.

    Args:
        point: any study of the group.
        built: its problem.
        plan: the privacy plan of the group's study with the largest cap.
        devices: what the studies are spread over.
        width: studies vmapped at once on a device.
        passes: the most passes of one portion.
        hospitals: hospitals of a cohort vmapped at once within a study.
        noisy: whether any study of the group adds noise.
    """

    def __init__(
        self,
        point: Point,
        built: Built,
        plan: PrivacyPlan,
        *,
        devices: Sequence[Any],
        width: int,
        passes: int,
        hospitals: int,
        noisy: bool = False,
    ) -> None:
        self.width, self.passes = width, passes
        self.traces = 0
        self._point, self._built, self._plan = point, built, plan
        self._task = built.make_task(point.seed)
        self._mesh = Mesh(np.asarray(devices), (AXIS,))
        self._optimizer = partial(make_server_optimizer, point.training.server)
        self._batch_norm = make_batch_norm(
            point.training.batch_norm, self._task, plan, point.training.aggregation, noisy=noisy
        )
        chunk = min(hospitals, plan.num_slots)
        # Empty slots after the last hospital fill the last chunk.
        self._slots = -(-plan.num_slots // chunk) * chunk
        self._make_round = partial(
            make_round,
            server_optimizer=self._optimizer,
            plan=plan,
            chunk=chunk,
            rule=make_rule(point.training.aggregation, plan),
            secure=make_secure_sum(
                point.training.aggregation, plan, trainable(self._task.parameters), scaffold=point.training.scaffold
            ),
            dropout=point.training.aggregation.dropout,
            batch_norm=self._batch_norm,
            schedule=make_schedule(point.training.local, rounds=point.training.rounds),
        )
        self._records: Any = None
        split, whole = PartitionSpec(AXIS), PartitionSpec()
        self._run = jax.jit(
            partial(
                jax.shard_map,
                mesh=self._mesh,
                in_specs=(whole, split, split, whole, whole, whole),
                out_specs=(split, split),
                check_vma=False,  # loops start from replicated zeros and end in a device's own values
            )(self._portion),
            donate_argnums=2,
        )
        self._start = jax.jit(self._begin, out_shardings=NamedSharding(self._mesh, split))
        self._compiled: Any = None

    @property
    def capacity(self) -> int:
        """The most studies of one portion, over all devices."""
        return self.width * self.passes * self._mesh.size

    def compile(self) -> dict[str, float | int]:
        """Compiles the program for its shapes; returns seconds, and bytes a device needs at its peak."""
        start = time.perf_counter()
        studies, progress = self.place([self._point] * self.capacity)
        lowered = self._run.lower(self._placed_records(), studies, progress, *(jnp.int32(0),) * 3)
        self._compiled = lowered.compile()
        memory = self._compiled.memory_analysis()
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        return {"compile_s": time.perf_counter() - start, "peak_bytes": peak - memory.alias_size_in_bytes}

    def place(self, points: Sequence[Point]) -> tuple[Studies, Progress]:
        """Puts up to `capacity` studies before their first round on the devices; the last one fills up the rest."""
        assert 0 < len(points) <= self.capacity
        chosen = [points[min(number, len(points) - 1)] for number in self._numbers()]

        def column(values: Sequence[float], dtype: Any = np.float32) -> Any:
            return np.asarray(values, dtype).reshape(-1, self.width)

        setting = Setting(
            clip_norm=column([p.privacy.clip_norm for p in chosen]),
            noise_multiplier=column([p.privacy.noise_multiplier for p in chosen]),
            local_rate=column([p.training.local.learning_rate for p in chosen]),
            server_rate=column([p.training.server.learning_rate for p in chosen]),
        )
        names = self._built.hospitals.names
        caps = column([plan_of(p, num_hospitals=len(names)).num_slots for p in chosen], np.int32)
        roots = [
            jax.random.key_data(root_key(seed=p.seed, name=root_name("", self._task.name, p.training, p.privacy)))
            for p in chosen
        ]
        keys = np.stack([np.asarray(root) for root in roots]).reshape(-1, self.width, *roots[0].shape)
        tasks = {seed: self._built.make_task(seed) for seed in {p.seed for p in chosen}}
        weights = {seed: jax.tree.map(np.asarray, task.parameters) for seed, task in tasks.items()}
        stacked = jax.tree.map(
            lambda *leaves: np.stack(leaves).reshape(-1, self.width, *leaves[0].shape),
            *(weights[p.seed] for p in chosen),
        )
        place = NamedSharding(self._mesh, PartitionSpec(AXIS))
        studies, progress = self._start(*jax.device_put((setting, caps, keys, stacked), place))
        return studies, progress

    def advance(
        self, studies: Studies, progress: Progress, *, count: int, first: int, last: int
    ) -> tuple[Progress, list[dict[str, Any]]]:
        """Runs rounds `first` to `last` of `count` studies and scores them; `progress` is used up.

        Returns:
            The progress, and per study the numerator and denominator of each score, `(held-out hospitals,)` each.
        """
        if self._compiled is None:
            self.compile()
        assert self._compiled is not None
        passes = -(-count // (self.width * self._mesh.size))
        bounds = (jnp.int32(passes), jnp.int32(first), jnp.int32(last))
        progress, scores = self._compiled(self._placed_records(), studies, progress, *bounds)
        return progress, self.collect(scores, count)

    def collect(self, tree: Any, count: int) -> list[Any]:
        """Brings a tree with the axes `(passes, width)` to the host, one tree per study in the order of `place`."""
        flat = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), tree)
        places = np.argsort(self._numbers())
        return [jax.tree.map(lambda leaf, at=place: leaf[at], flat) for place in places[:count]]

    def _numbers(self) -> np.ndarray:
        """Which study stands in each place `(device, pass, width)`, flat.

        Pass by pass over all devices, so that a portion of few studies leaves no device idle.
        """
        devices = self._mesh.size
        numbers = np.arange(self.capacity).reshape(self.passes, devices, self.width)
        return numbers.swapaxes(0, 1).reshape(-1)

    def _begin(self, setting: Setting, caps: jax.Array, keys: jax.Array, parameters: Any) -> tuple[Studies, Progress]:
        number = len(self._built.hospitals)

        def one(own: Setting, cap: jax.Array, root: jax.Array, weights: Any) -> tuple[Studies, Progress]:
            controls = None
            if self._point.training.scaffold:
                zeros = jax.tree.map(jnp.zeros_like, trainable(weights))
                every = jax.tree.map(lambda leaf: jnp.zeros((number, *leaf.shape), leaf.dtype), zeros)
                controls = Controls(zeros, every)
            quantile = self._point.privacy.clipping == "quantile"
            server = self._optimizer(own.server_rate).init(trainable(weights))
            clip_norm = own.clip_norm if quantile else None
            statistics = start_statistics(self._batch_norm, weights, number)
            state = RoundState(weights, server, jnp.int32(0), controls, clip_norm, statistics=statistics)
            losses = jnp.full(self._point.training.rounds, jnp.nan, jnp.float32)
            studies = Studies(own, jax.random.wrap_key_data(root), cap)
            return studies, Progress(state, losses, jnp.int32(0))

        return jax.vmap(jax.vmap(one))(setting, caps, keys, parameters)

    def _placed_records(self) -> Any:
        if self._records is None:
            hospitals, held_out = self._built.hospitals, self._built.held_out
            records = (hospitals.records, hospitals.counts, held_out.records, held_out.counts)
            self._records = jax.device_put(records, NamedSharding(self._mesh, PartitionSpec()))
        return self._records

    def _portion(
        self, records: Any, studies: Studies, progress: Progress, passes: Any, first: Any, last: Any
    ) -> tuple[Progress, Any]:
        """All passes of one device."""
        self.traces += 1  # runs when the program is traced, which is once
        study = partial(self._study, records, first, last)
        if self.width > 1:
            study = jax.vmap(study)

        def one_pass(index: jax.Array, carry: tuple[Progress, Any]) -> tuple[Progress, Any]:
            progress, scores = carry
            own = jax.tree.map(lambda leaf: leaf[index], (studies, progress))
            if self.width == 1:
                own = jax.tree.map(lambda leaf: leaf[0], own)
            outcome = study(*own)
            if self.width == 1:
                outcome = jax.tree.map(lambda leaf: leaf[None], outcome)
            return jax.tree.map(lambda whole, part: whole.at[index].set(part), (progress, scores), outcome)

        shapes = jax.eval_shape(study, *jax.tree.map(self._first, (studies, progress)))[1]
        lead = (self.passes,) if self.width > 1 else (self.passes, 1)
        scores = jax.tree.map(lambda leaf: jnp.zeros((*lead, *leaf.shape), leaf.dtype), shapes)
        return jax.lax.fori_loop(0, passes, one_pass, (progress, scores))

    def _first(self, leaf: jax.Array) -> jax.Array:
        return leaf[0] if self.width > 1 else leaf[0, 0]

    def _study(
        self, records: Any, first: Any, last: Any, study: Studies, progress: Progress
    ) -> tuple[Progress, Scores]:
        """Rounds `first` to `last` of one study, then its scores."""
        rows, counts, held_out, held_counts = records
        update = local_update_of(self._task, self._point.training.local, self._plan)

        def update_of_number(parameters: Any, hospital: jax.Array, count: jax.Array, **rest: Any) -> LocalResult:
            # A hospital comes as its number: a study holds one hospital's records at a time, not its cohort's.
            return update(parameters, jax.tree.map(lambda leaf: leaf[hospital], rows), count, **rest)

        run_round = self._make_round(update_of_number)

        def one_round(index: jax.Array, progress: Progress) -> Progress:
            key = jax.random.fold_in(study.key, index)
            cohort = self._plan.sample(key=jax.random.fold_in(key, 0), number=index)
            missing = self._slots - cohort.indices.shape[0]
            indices = jnp.pad(cohort.indices, (0, missing))
            present = jnp.pad(cohort.mask, (0, missing)) & (jnp.arange(self._slots) < study.cap)
            cohort_counts = jnp.where(present, counts[indices], 0)
            placed = CohortRecords(indices, cohort_counts, indices)
            state, metrics = run_round(progress.state, placed, study.setting, jax.random.fold_in(key, 1))
            number = jnp.sum(present)
            loss = jnp.sum(jnp.where(present, metrics.slots.loss, 0)) / number
            # Infinite where it is not finite at all, since NaN says that nobody took part.
            loss = jnp.where(jnp.isfinite(loss), loss, jnp.inf)
            broken = jnp.sum(present & ~jnp.isfinite(metrics.slots.update_norm))
            return Progress(
                state,
                progress.losses.at[index].set(jnp.where(number > 0, loss, jnp.nan)),
                progress.left_out + broken,
            )

        progress = jax.lax.fori_loop(first, last, one_round, progress)
        built, state = self._built, progress.state
        scores = score_hospitals(
            self._task,
            state.parameters,
            held_out,
            held_counts,
            batch_size=SCORED_AT_ONCE,
            statistics=own_statistics(state.parameters, state.statistics, built.hospitals.names, built.held_out.names),
        )
        return progress, scores
