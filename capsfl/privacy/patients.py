"""Patient-level differential privacy inside a hospital: DP-SGD whose unit is a patient with all of its slices.

    step = (1/m) [ sum over sampled patients of clip_S(gradient of the patient's mean loss) + N(0, z^2 S^2 I) ]

(Abadi et al. 2016, with the patient in the place of the record.) m is the expected number of patients in a step,
fixed. What it costs is in `patient_plan`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from capsfl.privacy.clipping import clip_by_global_norm
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.sampling import Cohort

SLICES_AT_ONCE = 8
"""Slices of one patient whose gradients are taken together; more cost memory and change no result."""


class PatientSum(NamedTuple):
    """What a local step sums over its patients.

    Attributes:
        total: pytree like the parameters, the sum of clipped gradients; L2 sensitivity S.
        loss: scalar, sum of the patients' mean losses; not private, for the hospital's own log.
        patients: scalar int32, how many patients took part; not private either.
    """

    total: Any
    loss: Array
    patients: Array


def clipped_patient_sum(
    loss_gradient: Callable[[Any, Any, Array], tuple[Array, Any]],
    parameters: Any,
    records: Any,
    patient_of_record: Array,
    patients: Cohort,
    *,
    clip_norm: ArrayLike,
) -> PatientSum:
    """Returns the sum over patients of the gradient of each one's mean loss, clipped to S as a whole.

    Guarantee: adding or removing a patient moves `total` by at most S, whatever its slices hold: no gradient is
    computed from the slices of two patients, and one that is not finite counts as zero. Patients are scanned, and
    a patient's slices go `SLICES_AT_ONCE` at a time, so memory grows with neither.

    Args:
        loss_gradient: `(parameters, batch, weights) -> (loss, gradient)` of the sum of weight times loss, record
            by record; `weights` is `(batch,)` float32 and sums to at most 1.
        parameters: pytree.
        records: pytree `(records, ...)`.
        patient_of_record: `(records,)` int32; negative where the row is padding.
        patients: indices `(slots,)` and mask `(slots,)` of the sampled patients.
        clip_norm: S > 0.
    """
    order = jnp.argsort(patient_of_record, stable=True)
    owners = patient_of_record[order]
    offsets = jnp.arange(SLICES_AT_ONCE, dtype=jnp.int32)

    def add_patient(carry: PatientSum, slot: Cohort) -> tuple[PatientSum, None]:
        first = jnp.searchsorted(owners, slot.indices, side="left").astype(jnp.int32)
        slices = jnp.searchsorted(owners, slot.indices, side="right").astype(jnp.int32) - first
        slices = jnp.where(slot.mask, slices, 0)

        def add_slices(index: Array, sums: tuple[Array, Any]) -> tuple[Array, Any]:
            positions = index * SLICES_AT_ONCE + offsets
            weights = (positions < slices).astype(jnp.float32) / slices.astype(jnp.float32)
            # Idle places repeat the patient's own slices: another's could bring in a NaN, even at weight 0.
            rows = order[first + positions % slices]
            batch = jax.tree.map(lambda leaf: leaf[rows], records)
            return jax.tree.map(jnp.add, sums, loss_gradient(parameters, batch, weights))

        nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters))
        turns = (slices + SLICES_AT_ONCE - 1) // SLICES_AT_ONCE
        loss, gradient = jax.lax.fori_loop(0, turns, add_slices, nothing)
        clipped, _ = clip_by_global_norm(gradient, clip_norm)
        total = jax.tree.map(jnp.add, carry.total, clipped)
        return PatientSum(total, carry.loss + loss, carry.patients + (slices > 0).astype(jnp.int32)), None

    start = PatientSum(jax.tree.map(jnp.zeros_like, parameters), jnp.zeros(()), jnp.int32(0))
    return jax.lax.scan(add_patient, start, patients)[0]


def count_patients(patient_of_record: np.ndarray, *, hospital: str) -> int:
    """Returns how many patients a hospital has, for `patient_plan`; the program derives the same number.

    Args:
        patient_of_record: `(records,)` integers, without padding.
        hospital: its name, for the refusal.

    Raises:
        PrivacyError: the numbers are not 0, 1, ... without gaps: the program would draw patients who are not
            there, with a probability other than the one accounted.
    """
    numbers = np.unique(patient_of_record)
    if not np.array_equal(numbers, np.arange(numbers.size)):
        shown = f"{numbers[:8].tolist()}"
        raise PrivacyError(f"{hospital}.patient", shown, "must number the hospital's patients 0, 1, ... without gaps")
    return int(numbers.size)


def steps_in_epoch(num_patients: Any, expected_patients: int) -> Any:
    """Returns the local steps after which each patient is expected once: ceil(N / m), for ints and traced ints."""
    return (num_patients + expected_patients - 1) // expected_patients
