"""How a cohort is laid over devices: one device, `jax.pmap`, or `jax.shard_map`; the body is the same."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pydantic import Field

from capsfl.federated.aggregation import Rule
from capsfl.federated.local import LocalResult
from capsfl.federated.round import CohortRecords, RoundMetrics, RoundState, Setting, make_round
from capsfl.privacy.plan import PrivacyPlan
from capsfl.settings import Settings

AXIS = "hospitals"


class DevicesConfig(Settings):
    """Where the hospitals of a cohort are trained."""

    parallel: Literal["single", "pmap", "shard_map"] = "single"
    """One device, or the cohort split over all visible ones by `jax.pmap` or by `jax.shard_map`."""
    chunk: int | None = Field(default=None, ge=1)
    """L, hospitals vmapped at once on a device; default 1 on CPU, whose caches hold one, else the whole share."""


class CohortProgram:
    """A compiled round together with the layout its cohort needs.

    Args:
        local_update: training of one hospital.
        server_optimizer: `learning_rate -> optimizer`, the server's step.
        plan: sampler and noise; its slots are padded to fill the devices.
        config: layout.
        devices: defaults to all local devices (the first one for `single`).
        rule: robust rule over the stacked updates; None for the sum.
        spread: whether the moments of the updates are measured.
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
    ) -> None:
        self._parallel = config.parallel
        self._devices: list[Any] = list(devices or jax.local_devices())
        if config.parallel == "single":
            self._devices = self._devices[:1]
        share = -(-plan.num_slots // len(self._devices))
        default_chunk = 1 if self._devices[0].platform == "cpu" else share
        chunk = min(config.chunk or default_chunk, share)
        share = -(-share // chunk) * chunk
        self.num_slots = share * len(self._devices)
        self._mesh = Mesh(np.asarray(self._devices), (AXIS,))
        axis = None if config.parallel == "single" else AXIS
        # A prefix of the metrics' tree: slots are split over the devices, the rest is the same on all of them.
        layout: Any = RoundMetrics
        body = make_round(local_update, server_optimizer, plan, chunk=chunk, axis_name=axis, rule=rule, spread=spread)
        if config.parallel == "single":
            self._run = jax.jit(body)
        elif config.parallel == "pmap":
            self._run = jax.pmap(
                body,
                axis_name=AXIS,
                in_axes=(None, 0, None, None),
                out_axes=(None, layout(0, None, None)),
                devices=self._devices,
            )
        else:
            whole, split = PartitionSpec(), PartitionSpec(AXIS)
            self._run = jax.jit(
                partial(
                    jax.shard_map,
                    mesh=self._mesh,
                    in_specs=(whole, split, whole, whole),
                    out_specs=(whole, layout(split, whole, whole)),
                    # The loop over a hospital's steps starts from replicated weights and ends in its own.
                    check_vma=False,
                )(body)
            )

    def place(self, cohort: CohortRecords) -> CohortRecords:
        """Pads host arrays `(slots, ...)` with empty slots and puts them where the program reads them."""

        def pad(leaf: np.ndarray) -> np.ndarray:
            leaf = np.asarray(leaf)
            missing = self.num_slots - leaf.shape[0]
            return np.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)) if missing else leaf

        padded = jax.tree.map(pad, cohort)
        if self._parallel == "single":
            return jax.device_put(padded, self._devices[0])
        if self._parallel == "pmap":
            padded = jax.tree.map(lambda leaf: leaf.reshape(len(self._devices), -1, *leaf.shape[1:]), padded)
        return jax.device_put(padded, NamedSharding(self._mesh, PartitionSpec(AXIS)))

    def replicate(self, state: RoundState) -> RoundState:
        """Puts a state where a round leaves it, so that the first round is compiled for all that follow."""
        if self._parallel == "shard_map":
            return jax.device_put(state, NamedSharding(self._mesh, PartitionSpec()))
        return jax.device_put(state, self._devices[0])

    def __call__(
        self, state: RoundState, cohort: CohortRecords, setting: Setting, key: jax.Array
    ) -> tuple[RoundState, RoundMetrics]:
        """Runs one round; the slots' metrics come back `(slots,)` on the host."""
        state, metrics = self._run(state, cohort, setting, key)
        slots: Any = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1), metrics.slots)
        return state, RoundMetrics(slots, metrics.spread, metrics.clip_norm)
