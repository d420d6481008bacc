"""Held-out patients of a classification: each is decided once, from all of its images, as a study decides it."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capsfl.evaluation import Images
from capsfl.federated.patients import records_by_hospital
from capsfl.learning import networks
from capsfl.learning.classification import score_calls
from capsfl.learning.patients import Patient
from capsfl.learning.tasks import Scores, Task


def patient_records(patients: Iterable[Patient], images: Images, *, most: int) -> dict[str, Any]:
    """Returns one record a patient by hospital: its images, which of them there are, its label.

    Args:
        patients: with a label.
        images: of the patients.
        most: images that a record has room for.

    Returns:
        `{hospital: {"image": (patients, most, side, side, 1), "here": (patients, most), "label": (patients,)}}`.
    """

    def record(patient: Patient) -> dict[str, np.ndarray]:
        found = images.of(patient)
        filled = np.pad(found, [(0, most - len(found)), *[(0, 0)] * (found.ndim - 1)])
        here = np.arange(most) < len(found)
        return {"image": filled[None], "here": here[None], "label": np.array([patient.label], np.int32)}

    return records_by_hospital(patients, record)


def score_patients(make_task: Callable[[int], Task], *, top: int) -> Callable[[int], Task]:
    """Returns the task whose scores are those of `patient_records`; what is trained stays as it is.

    A patient's class probabilities are their mean over the `top` images that look least like class 0
    (`capsfl.learning.classification.judge`), and the most probable class is called.
    """

    def make(seed: int) -> Task:
        task = make_task(seed)

        def scores(weights: Any, batch: Any, weight: jax.Array) -> Scores:
            images, here = batch["image"], batch["here"]
            flat = images.reshape(-1, *images.shape[2:])
            each = networks.class_probabilities(networks.ask(task.merge(weights), flat))  # pyright: ignore[reportArgumentType]
            each, classes = each.reshape(*images.shape[:2], -1), each.shape[-1]
            order = jnp.argsort(jnp.where(here, each[..., 0], jnp.inf), axis=1)[:, :top]
            chosen = jnp.take_along_axis(each, order[..., None], axis=1)
            counted = jnp.take_along_axis(here, order, axis=1)[..., None]
            called = jnp.argmax(jnp.sum(chosen * counted, axis=1), axis=-1)
            return score_calls(called, batch["label"], weight, classes=classes)

        return replace(task, scores=scores)

    return make
