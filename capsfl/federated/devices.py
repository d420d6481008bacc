"""How a cohort is laid over devices: one device, `jax.pmap`, or `jax.shard_map`; the body is the same."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pydantic import Field

from capsfl.federated.aggregation import Rule
from capsfl.federated.batch_norm import BatchNormRule
from capsfl.federated.local import LocalResult
from capsfl.federated.round import CohortRecords, RoundMetrics, RoundState, Setting, make_round
from capsfl.federated.secure import SecureSum
from capsfl.federated.votes import VotingRule
from capsfl.privacy.plan import PrivacyPlan
from capsfl.processes import ProcessesConfig, ProcessesError, meet

AXIS = "hospitals"


class DevicesConfig(ProcessesConfig):
    """Where the hospitals of a cohort are trained."""

    parallel: Literal["single", "pmap", "shard_map"] = "single"
    """One device, or the cohort split over all visible ones by `jax.pmap` or by `jax.shard_map`; several processes,
    over all of whose devices it is then split, need `shard_map`."""
    chunk: int | None = Field(default=None, ge=1)
    """L, hospitals vmapped at once on a device; when absent measured in the first round, where that pays."""
    memory_fraction: float = Field(default=0.8, gt=0, le=1)
    """Share of a device's free memory (on a CPU the machine's) that a round may fill where L is measured."""


class PlannedBytes(NamedTuple):
    """What XLA plans for a round on one device; zeros where it does not tell.

    Attributes:
        arguments: state and the cohort's records; grow with the cohort.
        results: the next state and the metrics.
        temporaries: everything between; grows with L.
    """

    arguments: int
    results: int
    temporaries: int


class CohortProgram:
    """A compiled round together with the layout its cohort needs.

    Args:
        local_update: training of one hospital.
        server_optimizer: `learning_rate -> optimizer`, the server's step.
        plan: sampler and noise; its slots are padded to fill the devices.
        config: layout; where L is absent it is 1 on a CPU, whose caches hold one hospital, else the whole share.
        devices: defaults to all devices of all processes (the first one for `single`).
        rule: robust rule over the stacked updates; None for the sum.
        spread: whether the moments of the updates are measured.
        secure: adds up masked words instead of updates.
        voting: weighs the stacked updates by the cohort's votes.
        dropout: the chance that a hospital's update never arrives.
        keep_updates: hands the clipped updates over one by one.
        batch_norm: what becomes of running statistics.
        schedule: share of the local learning rate by round.

    Raises:
        ProcessesError: several processes, and a layout for one.
    """

    def __init__(
        self,
        local_update: Callable[..., LocalResult],
        server_optimizer: Callable[[jax.Array], optax.GradientTransformation],
        plan: PrivacyPlan,
        *,
        config: DevicesConfig,
        devices: Sequence[Any] | None = None,
        rule: Rule | None = None,
        spread: bool = False,
        secure: SecureSum | None = None,
        voting: VotingRule | None = None,
        dropout: float = 0.0,
        keep_updates: bool = False,
        batch_norm: BatchNormRule | None = None,
        schedule: Callable[[jax.Array], jax.Array] | None = None,
    ) -> None:
        self._parallel = config.parallel
        self._several = jax.process_count() > 1
        self._compiled = False
        if self._several and config.parallel != "shard_map":
            raise ProcessesError(
                f'devices.parallel = "{config.parallel}": lays the cohort over one process, and {jax.process_count()} '
                'take part; set it to "shard_map", or start one process'
            )
        self._devices: list[Any] = list(devices or jax.devices())
        if config.parallel == "single":
            self._devices = self._devices[:1]
        share = -(-plan.num_slots // len(self._devices))
        default_chunk = 1 if self._devices[0].platform == "cpu" else share
        self.chunk = chunk = min(config.chunk or default_chunk, share)
        self.share = -(-share // chunk) * chunk
        self.num_slots = self.share * len(self._devices)
        self._mesh = Mesh(np.asarray(self._devices), (AXIS,))
        axis = None if config.parallel == "single" else AXIS
        # A prefix of the metrics' tree: slots are split over the devices, the rest is the same on all of them.
        layout: Any = RoundMetrics
        body = make_round(
            local_update, server_optimizer, plan, chunk=chunk, axis_name=axis, rule=rule, spread=spread, secure=secure,
            voting=voting, dropout=dropout, keep_updates=keep_updates, batch_norm=batch_norm, schedule=schedule,
        )  # fmt: skip
        if config.parallel == "single":
            self._run = jax.jit(body)
        elif config.parallel == "pmap":
            self._run = jax.pmap(
                body,
                axis_name=AXIS,
                in_axes=(None, 0, None, None),
                out_axes=(None, layout(0, None, None, None, 0)),
                devices=self._devices,
            )
        else:
            whole, split = PartitionSpec(), PartitionSpec(AXIS)
            self._run = jax.jit(
                partial(
                    jax.shard_map,
                    mesh=self._mesh,
                    in_specs=(whole, split, whole, whole),
                    out_specs=(whole, layout(split, whole, whole, whole, split)),
                    # The loop over a hospital's steps starts from replicated weights and ends in its own.
                    check_vma=False,
                )(body)
            )

    @property
    def devices(self) -> Sequence[Any]:
        """The devices that the cohort is split over."""
        return self._devices

    def arrange(self, counts: np.ndarray) -> np.ndarray:
        """`arrange_slots` for this layout."""
        return arrange_slots(counts, share=self.share, devices=len(self._devices), chunk=self.chunk)

    def place(self, cohort: CohortRecords) -> CohortRecords:
        """Puts host arrays `(num_slots, ...)`, laid out by `arrange`, where the program reads them."""
        if self._parallel == "single":
            return jax.device_put(cohort, self._devices[0])
        if self._parallel == "pmap":
            cohort = jax.tree.map(lambda leaf: leaf.reshape(len(self._devices), -1, *leaf.shape[1:]), cohort)
        return self._spread(cohort, PartitionSpec(AXIS))

    @property
    def own(self) -> np.ndarray:
        """`(num_slots,)` bool, the slots that lie on this process's devices; the others' records it need not read."""
        return np.repeat([device.process_index == jax.process_index() for device in self._devices], self.share)

    def replicate(self, state: RoundState) -> RoundState:
        """Puts a state where a round leaves it, so that the first round is compiled for all that follow."""
        if self._parallel == "shard_map":
            return self._spread(state, PartitionSpec())
        return jax.device_put(state, self._devices[0])

    def compile(self, state: RoundState, cohort: CohortRecords, setting: Setting, key: jax.Array) -> PlannedBytes:
        """Compiles the round ahead of its first call; shapes, `jax.ShapeDtypeStruct`, will do for the arguments."""
        plan = self._run.lower(state, cohort, setting, key).compile().memory_analysis()
        if plan is None:
            return PlannedBytes(0, 0, 0)
        results = plan.output_size_in_bytes - plan.alias_size_in_bytes
        return PlannedBytes(plan.argument_size_in_bytes, results, plan.temp_size_in_bytes)

    def dispatch(
        self, state: RoundState, cohort: CohortRecords, setting: Setting, key: jax.Array
    ) -> tuple[RoundState, RoundMetrics]:
        """Starts one round and returns at once; its slots are still split over the devices."""
        if self._several:
            setting, key = self._spread((setting, key), PartitionSpec())
            if not self._compiled:
                self.compile(state, cohort, setting, key)
                self._compiled = True
            # Gloo waits half a minute for the others, and one may still have been compiling or writing its ledger.
            meet()
        return self._run(state, cohort, setting, key)

    def collect(self, metrics: RoundMetrics) -> RoundMetrics:
        """Waits for the slots' metrics and brings them `(num_slots,)` to the host; updates stay on the devices."""
        gathered = process_allgather(metrics.slots, tiled=True) if self._several else metrics.slots
        slots: Any = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1), gathered)
        updates = process_allgather(metrics.updates, tiled=True) if self._several else metrics.updates
        if self._parallel == "pmap":
            updates = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), updates)
        return metrics._replace(slots=slots, updates=updates)

    def _spread(self, tree: Any, spec: PartitionSpec) -> Any:
        """Puts a tree on the mesh; of several processes each gives its own devices' part, and has to hold no more."""
        sharding = NamedSharding(self._mesh, spec)
        if not self._several:
            return jax.device_put(tree, sharding)

        def spread(leaf: Any) -> jax.Array:
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                return leaf  # from a round, or restored: it lies there already
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(spread(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
            host = np.asarray(leaf)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(spread, tree)


def arrange_slots(counts: np.ndarray, *, share: int, devices: int, chunk: int) -> np.ndarray:
    """Lays a cohort out so that no hospital waits long for another.

    A vmapped chunk takes the steps of its largest hospital, so hospitals of like size share one. Chunks are dealt to
    the devices back and forth from the largest down, so that the devices, too, have about the same to do.

    Args:
        counts: `(cohort,)` records of each hospital, 0 for a masked slot.
        share: slots of a device, a multiple of `chunk`.
        devices: how many.
        chunk: L.

    Returns:
        `(devices * share,)` positions in the cohort, device by device; `len(counts)` stands for an empty slot.
    """
    order = np.full(devices * share, len(counts))
    order[: len(counts)] = np.argsort(-np.asarray(counts), kind="stable")
    rows = order.reshape(-1, devices, chunk)
    rows[1::2] = rows[1::2, ::-1].copy()
    return rows.swapaxes(0, 1).reshape(-1)


def on_one_device(tree: Any) -> Any:
    """Takes what all devices hold alike, such as weights, from one of this process's."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf, tree)
