"""Patient-level differential privacy inside a hospital: DP-SGD whose unit is a patient with all of its slices.

    step = (1/m) [ sum over sampled patients of clip_S(gradient of the patient's mean loss) + N(0, z^2 S^2 I) ]

(Abadi et al. 2016, with the patient in the place of the record.) m is the expected number of patients in a step,
fixed. Every hospital has its own epsilon, because its own number of patients sets how often each is drawn; that
number is taken as public. The guarantee holds against the server and the other hospitals.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from pydantic import Field

from capsfl.privacy import accounting
from capsfl.privacy.clipping import clip_by_global_norm
from capsfl.privacy.events import PrivacyError, SampledGaussian
from capsfl.privacy.plan import PrivacyStatement
from capsfl.privacy.sampling import Cohort
from capsfl.settings import Settings

SLICES_AT_ONCE = 8
"""Slices of one patient whose gradients are taken together; more cost memory and change no result."""


class PatientPrivacyConfig(Settings):
    """Patient-level differential privacy of what a hospital sends."""

    clip_norm: float = Field(gt=0)
    """S, the L2 norm a patient's gradient is clipped to."""
    noise_multiplier: float = Field(ge=0)
    """z, the standard deviation of the noise on the SUM of patients' gradients divided by S."""
    expected_patients: int = Field(ge=1)
    """m, the expected number of patients in a local step and the divisor of the sum."""
    delta: float = Field(default=1e-5, ge=accounting.SMALLEST_DELTA, lt=1)
    """The probability with which the epsilon bound may fail; well below 1 / patients."""
    truncation: int | None = Field(default=None, ge=1)
    """The most patients a step takes; when absent, the smallest cap costing < 0.1 % of epsilon."""


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


@dataclass(frozen=True)
class PatientPlan:
    """The sampler and the accountant of patient-level privacy, one mechanism for every hospital.

    Build it with `patient_plan`. It hashes, so it serves as a static argument.

    Attributes:
        config: the settings.
        mechanisms: of each hospital, whose "hospitals" are its patients and whose "cohort" is m.
        epochs: local epochs in a round, `steps_in_epoch` steps each.
        truncation: the slots of a local step, common to all hospitals.
    """

    config: PatientPrivacyConfig
    mechanisms: tuple[SampledGaussian, ...]
    epochs: int
    truncation: int

    def steps(self, hospital: int) -> int:
        """Returns the local steps a hospital takes in a round."""
        return self.epochs * steps_in_epoch(self.mechanisms[hospital].hospitals, self.config.expected_patients)

    def epsilon(self, hospital: int, rounds: int) -> float | None:
        """Returns the epsilon of a hospital's patients after `rounds` of its rounds, or None when unbounded."""
        steps = rounds * self.steps(hospital)
        figure = accounting.epsilon(self.mechanisms[hospital], rounds=steps, delta=self.config.delta)
        return figure if math.isfinite(figure) else None

    def statement(self, hospital: int, rounds: int) -> PrivacyStatement:
        """Returns the guarantee of a hospital's patients: in it, hospitals are patients and rounds are local steps."""
        steps = rounds * self.steps(hospital)
        account = accounting.account(self.mechanisms[hospital], rounds=steps, delta=self.config.delta)
        patients = account.hospitals
        few = [f"delta should stay well below 1/{patients}"] if self.config.delta * patients >= 1 else []
        vain = [part for part in account.remark.split("; ") if part.startswith(("nothing", "an epsilon"))]
        here = "hospitals counts this hospital's patients, rounds its local steps"
        account = replace(account, unit="patient", remark="; ".join([*vain, *few, here]))
        return PrivacyStatement(**asdict(account), clip_norm=self.config.clip_norm)


def patient_plan(config: PatientPrivacyConfig, *, patients: Sequence[int], rounds: int, epochs: int = 1) -> PatientPlan:
    """Returns the plan of hospitals with `patients` patients each.

    An absent cap becomes the largest of those the hospitals need; each is accounted at the cap it runs under.

    Args:
        config: the settings.
        patients: patients of each hospital.
        rounds: the rounds an automatic cap is chosen for.
        epochs: local epochs in a round.

    Raises:
        PrivacyError: a hospital has fewer patients than a step expects, or the cap does not fit.
    """
    expected, mechanisms = config.expected_patients, []
    for hospital, count in enumerate(patients):
        if count < expected:
            remedy = (
                f"hospital {hospital} has {count} patients, fewer than a local step expects; "
                "lower it, or leave the hospital out"
            )
            raise PrivacyError("patient_privacy.expected_patients", expected, remedy)
        cap = None if config.truncation is None else min(config.truncation, count)
        try:
            mechanism = SampledGaussian("poisson", count, expected, config.noise_multiplier, cap)
        except PrivacyError as error:
            raise error.under("patient_privacy") from None
        steps = rounds * epochs * steps_in_epoch(count, expected)
        mechanisms.append(accounting.resolve_truncation(mechanism, rounds=steps, delta=config.delta))
    if not mechanisms:
        raise PrivacyError("patients", list(patients), "no hospital has patients")
    widest = max(mechanism.num_slots for mechanism in mechanisms)
    common = tuple(replace(each, truncation=min(widest, each.hospitals)) for each in mechanisms)
    return PatientPlan(config, common, epochs, widest)
