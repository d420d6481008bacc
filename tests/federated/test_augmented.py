"""Augmentation inside the local step: keyed by round, hospital, step and record, and before the clipping."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsfl.federated.local import LocalConfig, make_local_update
from capsfl.federated.private_local import make_private_local_update
from capsfl.learning.tasks import Task

DIMENSION = 3


def task(*, scale: float = 1.0) -> Task:
    """A linear loss whose gradient is the mean of what a step saw; augmentation adds a draw to every record."""

    def augment(key: jax.Array, record: Any) -> Any:
        return record | {"x": record["x"] + scale * jax.random.normal(key, (DIMENSION,))}

    def loss(weights: jax.Array, batch: Any) -> jax.Array:
        return jnp.vdot(weights, batch["x"].mean(axis=0))

    merge: Any = None
    return Task("line", loss, lambda *_: {}, jnp.zeros(DIMENSION), merge, augment=augment)


CONFIG = LocalConfig(optimizer="sgd", learning_rate=1.0, batch_size=2, epochs=2)
RECORDS = {"x": jnp.arange(18.0).reshape(6, DIMENSION)}
COUNT = np.int32(5)


@pytest.fixture(scope="module")
def update():
    """One hospital's update by key."""
    local = make_local_update(task(), CONFIG)
    return jax.jit(lambda key, records, count: local(jnp.zeros(DIMENSION), records, count, key=key).update)


def test_hospitals_trained_together_get_what_each_gets_alone(update):
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(3))
    stacked = {"x": jnp.stack([RECORDS["x"], RECORDS["x"] + 1, RECORDS["x"] * 2])}
    counts = np.array([5, 3, 6], np.int32)
    together = jax.vmap(update)(keys, stacked, counts)
    for hospital in range(3):
        alone = update(keys[hospital], {"x": stacked["x"][hospital]}, counts[hospital])
        np.testing.assert_allclose(together[hospital], alone, rtol=1e-5, atol=1e-5)
    assert not np.allclose(together[0], update(keys[1], RECORDS, COUNT)), "another hospital draws otherwise"


def test_a_record_is_changed_anew_in_every_step():
    """With the records at zero an update is minus the sum of the steps' mean draws."""
    zero = {"x": jnp.zeros((1, DIMENSION))}
    config = CONFIG.model_copy(update={"batch_size": 1})
    key = jax.random.key(4)
    steps = {}
    for epochs in (1, 2):
        local = make_local_update(task(), config.model_copy(update={"epochs": epochs}))
        steps[epochs] = np.asarray(local(jnp.zeros(DIMENSION), zero, np.int32(1), key=key).update)
    second = steps[2] - steps[1]
    assert np.abs(second).min() > 1e-3
    assert np.abs(second - steps[1]).min() > 1e-3


def test_without_augmentation_nothing_is_drawn():
    bare = replace(task(), augment=None)
    updates = [
        np.asarray(make_local_update(one, CONFIG)(jnp.zeros(DIMENSION), RECORDS, COUNT, key=jax.random.key(2)).update)
        for one in (task(scale=0.0), bare)
    ]
    np.testing.assert_allclose(*updates, rtol=1e-6)


@cache
def private_program(patients: int, clip_norm: float) -> Callable[..., Any]:
    """One step without noise in which every patient takes part."""
    plan: Any = SimpleNamespace(
        config=SimpleNamespace(clip_norm=clip_norm, noise_multiplier=0.0),
        expected_patients=patients,
        epochs=lambda name: 1,
        truncation=lambda name: patients,
    )
    local = make_private_local_update(task(scale=100.0), CONFIG.model_copy(update={"epochs": 1}), plan)
    return jax.jit(lambda records, count: local(jnp.zeros(DIMENSION), records, count, key=jax.random.key(0)).update)


def private_update(records: dict[str, jax.Array], *, clip_norm: float) -> np.ndarray:
    """The patients' clipped gradients, summed."""
    patients = int(records["patient"].max()) + 1
    update = private_program(patients, clip_norm)(records, np.int32(len(records["patient"])))
    return -np.asarray(update) * patients


def test_a_patient_is_clipped_after_its_records_were_changed():
    lone = {"x": RECORDS["x"], "patient": jnp.zeros(6, jnp.int32)}
    assert np.linalg.norm(private_update(lone, clip_norm=0.5)) == pytest.approx(0.5, rel=1e-5)


def test_what_a_patient_adds_knows_nothing_of_the_others():
    two = {"x": RECORDS["x"], "patient": jnp.array([0, 0, 0, 1, 1, 1])}
    first = private_update(two, clip_norm=1e9)
    two["x"] = two["x"].at[3:].add(7.0)
    # The second patient's mean rises by 7, and nothing else moves.
    np.testing.assert_allclose(private_update(two, clip_norm=1e9) - first, 7.0, rtol=1e-4)
