"""Patients are protected as wholes: one moves the sum by at most S, whatever and how many its slices are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from capsfl.federated.local import LocalConfig, make_local_update
from capsfl.federated.private_local import make_private_local_update
from capsfl.learning.tasks import make_task
from capsfl.privacy import Cohort, PrivacyConfig, PrivacyError
from capsfl.privacy.patient_plan import PatientPlan, Stage, patient_plan
from capsfl.privacy.patients import clipped_patient_sum, count_patients
from capsfl.privacy.sampling import sample_patients


def _loss(weights, batch, share):
    return jnp.dot(share, jnp.square(batch["x"] @ weights["w"] - batch["y"]))


gradient = jax.value_and_grad(_loss)
PATIENT = np.repeat(np.arange(4), [1, 11, 8, 3]).astype(np.int32)
ROWS = PATIENT.size


def _records(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "x": jnp.asarray(generator.normal(size=(ROWS, 3)), jnp.float32),
        "y": jnp.asarray(generator.normal(size=ROWS), jnp.float32),
    }


WEIGHTS = {"w": jnp.array([0.3, -0.2, 0.5])}


def _sum(records, mask, clip_norm, patient=PATIENT):
    slots = Cohort(jnp.arange(4, dtype=jnp.int32), jnp.asarray(mask))
    return clipped_patient_sum(gradient, WEIGHTS, records, jnp.asarray(patient), slots, clip_norm=clip_norm)


@pytest.mark.parametrize("clip_norm", [0.1, 100.0])
def test_the_sum_is_that_of_clipped_gradients_of_mean_losses(clip_norm):
    records, expected = _records(), np.zeros(3)
    for number in (0, 1, 3):
        rows = number == PATIENT
        x, y = np.asarray(records["x"])[rows], np.asarray(records["y"])[rows]
        alone = 2 * ((x @ np.asarray(WEIGHTS["w"]) - y)[:, None] * x).mean(0)
        expected += alone * min(1, clip_norm / np.linalg.norm(alone))
    shuffled = np.random.default_rng(5).permutation(ROWS)
    mixed = jax.tree.map(lambda leaf: leaf[shuffled], records)
    found = jax.jit(lambda r: _sum(r, [True, True, False, True], clip_norm, PATIENT[shuffled]))(mixed)
    np.testing.assert_allclose(found.total["w"], expected, rtol=1e-4, atol=1e-6)
    assert int(found.patients) == 3


def test_one_patient_moves_the_sum_by_at_most_s_even_with_broken_slices():
    records = _records()
    without = _sum(records, [True, False, True, True], 0.1).total["w"]
    whole = _sum(records, [True, True, True, True], 0.1).total["w"]
    assert np.linalg.norm(whole - without) == pytest.approx(0.1, rel=1e-4)
    broken = records | {"x": records["x"].at[PATIENT == 1].set(jnp.nan)}
    np.testing.assert_allclose(_sum(broken, [True] * 4, 0.1).total["w"], without, rtol=1e-6)


def test_patients_are_drawn_equally_often_for_a_traced_number_of_them():
    draws = 4000
    keys = jax.random.split(jax.random.key(3), draws)

    def draw(key, count):
        return sample_patients(key=key, num_patients=count, capacity=12, expected=3, truncation=12)

    cohorts = jax.jit(jax.vmap(draw, (0, None)))(keys, jnp.int32(10))
    taken = np.bincount(np.asarray(cohorts.indices)[np.asarray(cohorts.mask)], minlength=12)
    assert taken[10:].sum() == 0
    statistic = ((taken[:10] - draws * 0.3) ** 2 / (draws * 0.21)).sum()
    assert statistic < stats.chi2.ppf(1 - 1e-4, 10)


def test_patients_are_counted_and_gaps_in_their_numbers_refused():
    assert count_patients(PATIENT, hospital="north") == 4
    with pytest.raises(PrivacyError, match=r"north\.patient = \[0, 2\]: must number"):
        count_patients(np.array([0, 2, 2]), hospital="north")


def _plan(patients: int, **privacy) -> PatientPlan:
    config = PrivacyConfig(unit="patient", **privacy)
    return patient_plan(config, [Stage("line", rounds=1, patients=(("north", patients),))])


def _task():
    def loss(model, batch):
        return jnp.mean(jnp.square(model(batch["x"])[:, 0] - batch["y"]))

    return make_task("line", nnx.Linear(3, 1, rngs=nnx.Rngs(0)), loss)


def test_without_clipping_or_noise_and_all_patients_it_is_gradient_descent():
    task = _task()
    one_each = np.arange(ROWS, dtype=np.int32)
    plan = _plan(ROWS, clip_norm=1e6, noise_multiplier=0.0, expected_patients=ROWS)
    local = LocalConfig(optimizer="sgd", learning_rate=0.1, batch_size=ROWS)
    records, count, key = _records(), jnp.int32(ROWS), jax.random.key(0)
    plain = make_local_update(task, local)(task.parameters, records, count, key=key)
    private = make_private_local_update(task, local, plan)(
        task.parameters, records | {"patient": jnp.asarray(one_each)}, count, key=key
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), private, plain)


def test_the_step_divides_by_the_expected_patients_and_its_noise_is_z_s_over_m():
    task = _task()
    plan = _plan(4, clip_norm=0.5, noise_multiplier=3.0, expected_patients=4)
    local = make_private_local_update(task, LocalConfig(optimizer="sgd", learning_rate=1.0), plan)
    records = _records() | {"patient": jnp.asarray(PATIENT)}
    run = jax.jit(jax.vmap(lambda key: local(task.parameters, records, jnp.int32(ROWS), key=key).update))
    updates = run(jax.random.split(jax.random.key(1), 4000))
    spread = np.concatenate([np.asarray(leaf).reshape(4000, -1) for leaf in jax.tree.leaves(updates)], 1).std(0)
    np.testing.assert_allclose(spread, 3.0 * 0.5 / 4, rtol=0.05)


def test_hospitals_without_records_send_nothing_and_missing_patients_are_named():
    task = _task()
    plan = _plan(4, clip_norm=0.5, noise_multiplier=1.0, expected_patients=2)
    local = make_private_local_update(task, LocalConfig(), plan)
    records = _records() | {"patient": jnp.asarray(PATIENT)}
    empty = local(task.parameters, records, jnp.int32(0), key=jax.random.key(0))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(empty.update))
    with pytest.raises(ValueError, match='no leaf "patient"'):
        local(task.parameters, _records(), jnp.int32(3), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"local\.epochs = 2: the patient plan accounts for 1 of line"):
        make_private_local_update(task, LocalConfig(epochs=2), plan)


def test_models_with_batch_normalisation_are_refused_by_name():
    class Net(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    task = make_task("net", Net(), lambda model, batch: jnp.float32(0))
    with pytest.raises(ValueError, match=r'the model of net has batch normalisation, .* choose norm = "group"'):
        make_private_local_update(
            task, LocalConfig(), _plan(4, clip_norm=0.5, noise_multiplier=1.0, expected_patients=2)
        )
