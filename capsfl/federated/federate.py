"""Federated training of anybody's Flax NNX model on anybody's arrays, in one call."""

import secrets
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from capsfl.federated.batch_norm import check_portable
from capsfl.federated.devices import DevicesConfig
from capsfl.federated.federation import Federation, RoundReport, RoundsConfig
from capsfl.federated.hospitals import Hospitals, HospitalSource, stack_hospitals
from capsfl.federated.patients import number_patients
from capsfl.learning.tasks import make_task
from capsfl.privacy.plan import PrivacyConfig, PrivacyStatement
from capsfl.privacy.secret import SECRET_BYTES


@dataclass(frozen=True)
class Federated:
    """The outcome of `federate`.

    Attributes:
        model: the trained model.
        history: one report per round.
        privacy: what the rounds cost, epsilon None where no noise was added.
    """

    model: nnx.Module
    history: tuple[RoundReport, ...]
    privacy: PrivacyStatement


def federate(
    model: nnx.Module,
    loss: Callable[[Any, Any], jax.Array],
    records: Mapping[str, Any] | HospitalSource,
    *,
    rounds: RoundsConfig = RoundsConfig(),
    privacy: PrivacyConfig = PrivacyConfig(clip_norm=1.0),
    devices: DevicesConfig = DevicesConfig(),
    seed: int = 0,
) -> Federated:
    """Trains an NNX model federated over hospitals (or any other holders of records).

    Every round draws a cohort, trains each of its members from the server's weights, clips every member's whole
    update to `privacy.clip_norm`, adds Gaussian noise to the sum, divides by the expected cohort and lets the server
    optimizer step (paper Eq 8). With `privacy.unit = "patient"` the noise is added inside the holders instead, to the
    clipped gradients of their patients. Guarantee: as `Federated.privacy` states it, with unit and relation.

    Args:
        model: weights are its `nnx.Param`; it is not changed.
        loss: `(model, batch) -> scalar`, mean over the batch; a batch has the structure of one hospital's records.
        records: for every hospital a pytree of arrays `(records, ...)`; sizes may differ. For more than memory holds
            `open_hospitals_store`, read cohort by cohort. For unit `patient` dictionaries with a leaf "patient"
            `(records,)`, integers that tell a hospital's patients apart, which the loss does not get to see.
        rounds: rounds, local and server optimizers.
        privacy: sampler, clip norm, noise multiplier, budget: training stops before exceeding the budget.
        devices: one device, pmap or shard_map, and how many hospitals each trains at once.
        seed: of every draw, but those of sampling and noise where `privacy.noise_key` is `secret`.

    Raises:
        ValueError: records that do not fit together, or a privacy section that contradicts itself; the message names
            the field.
    """
    task = make_task("model", model, loss)
    check_portable(task, rounds.batch_norm, privacy, rounds.aggregation)
    hospitals = stack_hospitals(records) if isinstance(records, Mapping) else records
    if privacy.unit == "patient" and isinstance(hospitals, Hospitals):
        hospitals = number_patients(hospitals)
    # A run that is not resumed needs no file to keep its secret in.
    secret = secrets.token_bytes(SECRET_BYTES) if privacy.noise_key == "secret" else None
    federation = Federation(task, hospitals, config=rounds, privacy=privacy, devices=devices, seed=seed, secret=secret)
    if caution := federation.plan.caution():
        warnings.warn(caution, stacklevel=2)
    total = rounds.rounds
    if privacy.target_epsilon is not None:
        total = min(total, federation.plan.max_rounds(privacy.target_epsilon))
    state, history = federation.init(), []
    for _ in range(total):
        state, report = federation.step(state)
        history.append(report)
    return Federated(task.merge(state.parameters), tuple(history), federation.plan.statement(total))
