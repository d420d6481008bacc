"""What one hospital does in a round when its patients are protected: DP-SGD, clipped and noised per patient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from capsfl.federated.local import LocalConfig, LocalResult, augmentation_key, make_local_update, make_optimizer
from capsfl.learning.tasks import Task, augmented, record_keys
from capsfl.privacy.mechanisms import add_gaussian
from capsfl.privacy.patient_plan import PatientPlan
from capsfl.privacy.patients import clipped_patient_sum, steps_in_epoch
from capsfl.privacy.plan import PrivacyPlan
from capsfl.privacy.sampling import sample_patients


def make_private_local_update(task: Task, config: LocalConfig, plan: PatientPlan) -> Callable[..., LocalResult]:
    """Builds the function one hospital runs in a round; it is vmapped over hospitals.

    A hospital of N patients takes `epochs * ceil(N / m)` steps. In each, every patient is drawn with
    probability m/N; the gradients of their mean losses are clipped to S and summed, N(0, z^2 S^2 I) is added, and
    the sum is divided by the expected m. The optimizer only sees that.

    A task that augments changes each record by a key of its own before its gradient is taken, so before the clipping:
    what a patient adds depends on its own records and on draws that know no data, and S bounds it as before. The draws
    of the others do depend on their places in the hospital; they are as secret as the sampling and the noise, which
    come from the same key.

    Guarantee: `plan.epsilon(hospital, rounds)`, patient-level, of the returned update, whatever the server then does
    with it. The loss is not private: for the hospital's own log.

    Args:
        task: its loss is taken record by record, so a record's loss must not depend on the batch it is in.
        config: optimizer and learning rate; m stands in for `batch_size`.
        plan: of these hospitals, with a stage of the task's name and the epochs of `config`.

    Returns:
        `(parameters, records, count, *, key, learning_rate, drift) -> LocalResult`, as `make_local_update`; a
        `drift` may hold nothing but what was released. `records` is a dictionary that holds an int32 leaf
        "patient" `(records,)`, numbering the hospital's patients from 0 without gaps, next to the data.

    Raises:
        ValueError: the plan accounts for another number of epochs; the model has batch normalisation, by which a
            patient's gradient depends on the others of its batch; or, when called, the patients are missing.
    """
    if task.loss_and_statistics is not None:
        raise ValueError(
            f'privacy.unit = "patient": the model of {task.name} has batch normalisation, which ties the patients of a '
            'batch to each other, so no clipping bounds one of them; choose norm = "group"'
        )
    epochs, truncation = plan.epochs(task.name), plan.truncation(task.name)
    if epochs != config.epochs:
        raise ValueError(
            f"local.epochs = {config.epochs}: the patient plan accounts for {epochs} of {task.name}; build it with "
            f"epochs={config.epochs}"
        )
    privacy, expected = plan.config, plan.expected_patients

    def weighted_loss(weights: Any, batch: Any, share: jax.Array) -> jax.Array:
        def alone(record: Any) -> jax.Array:
            return task.loss(weights, jax.tree.map(lambda leaf: leaf[None], record))

        data, keys = batch
        return jnp.dot(share, jax.vmap(alone)(augmented(task.augment, data, keys)))

    gradient = jax.value_and_grad(weighted_loss)

    def local_update(
        parameters: Any,
        records: Any,
        count: jax.Array,
        *,
        key: jax.Array,
        learning_rate: float | jax.Array = config.learning_rate,
        drift: Any = None,
    ) -> LocalResult:
        optimizer = make_optimizer(config, learning_rate)
        if not isinstance(records, dict) or "patient" not in records:
            raise ValueError(
                'records: no leaf "patient"; patient-level privacy needs the number of each record\'s patient, int32'
            )
        capacity = records["patient"].shape[0]
        patient = jnp.where(jnp.arange(capacity) < count, records["patient"], -1)
        data = {name: leaf for name, leaf in records.items() if name != "patient"}
        num_patients = jnp.max(patient) + 1
        steps = epochs * steps_in_epoch(num_patients, expected)

        def step(index: jax.Array, carry: tuple[Any, Any, jax.Array]) -> tuple[Any, Any, jax.Array]:
            weights, optimizer_state, total_loss = carry
            step_key = jax.random.fold_in(key, index)
            drawn = sample_patients(
                key=jax.random.fold_in(step_key, 0),
                num_patients=num_patients,
                capacity=capacity,
                expected=expected,
                truncation=truncation,
            )
            keys = None
            if task.augment is not None:
                keys = record_keys(augmentation_key(key, index), jnp.arange(capacity))
            summed = clipped_patient_sum(gradient, weights, (data, keys), patient, drawn, clip_norm=privacy.clip_norm)
            noisy = add_gaussian(
                summed.total,
                key=jax.random.fold_in(step_key, 1),
                standard_deviation=privacy.noise_multiplier * privacy.clip_norm,
            )
            mean = jax.tree.map(lambda leaf: leaf / expected, noisy)
            # Both are functions of released weights: after the noise, they cost no privacy.
            if config.proximal:
                mean = jax.tree.map(lambda g, w, w_t: g + config.proximal * (w - w_t), mean, weights, parameters)
            if drift is not None:
                mean = jax.tree.map(jnp.add, mean, drift)
            updates, optimizer_state = optimizer.update(mean, optimizer_state, weights)
            loss = summed.loss / jnp.maximum(summed.patients, 1)
            return optax.apply_updates(weights, updates), optimizer_state, total_loss + loss

        start = (parameters, optimizer.init(parameters), jnp.zeros(()))
        weights, _, total_loss = jax.lax.fori_loop(0, steps, step, start)
        update = jax.tree.map(jnp.subtract, weights, parameters)
        return LocalResult(update, total_loss / jnp.maximum(steps, 1), steps)

    return local_update


def local_update_of(task: Task, config: LocalConfig, plan: PrivacyPlan) -> Callable[..., LocalResult]:
    """Builds what a hospital does in a round under a plan: private within, or plain and clipped as a whole later."""
    if plan.patients is None:
        return make_local_update(task, config)
    return make_private_local_update(task, config, plan.patients)
