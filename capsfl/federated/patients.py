"""Patients inside stacked hospitals: which record is whose, and the privacy plan of one task over them."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from capsfl.federated.hospitals import Hospitals, HospitalSource
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.patient_plan import Stage
from capsfl.privacy.patients import count_patients
from capsfl.privacy.plan import PrivacyConfig, PrivacyPlan

PATIENT = "patient"
"""The leaf of records that holds the number of each record's patient, `(hospitals, records)` int32."""


def records_by_hospital(
    patients: Iterable[Any], records_of: Callable[[Any], dict[str, np.ndarray]], *, numbered: bool = False
) -> dict[str, Any]:
    """Concatenates the records of every hospital's patients: `{hospital: pytree of (records, ...)}`.

    Args:
        patients: each with the name of its `hospital`, and where numbered with `whose` it is, equal for the scans of
            one person.
        records_of: the records of one patient.
        numbered: whether to add the leaf "patient", which tells people apart, across hospitals too.
    """
    found: dict[str, list[dict[str, np.ndarray]]] = {}
    numbers: dict[Any, int] = {}
    for patient in patients:
        records = records_of(patient)
        if numbered:
            number = numbers.setdefault(patient.whose, len(numbers))
            records[PATIENT] = np.full(len(jax.tree.leaves(records)[0]), number, np.int32)
        found.setdefault(patient.hospital, []).append(records)
    return {name: jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows) for name, rows in sorted(found.items())}


def number_patients(hospitals: Hospitals) -> Hospitals:
    """Returns the same hospitals with the patients of each numbered 0, 1, ... in the order of their numbers so far.

    Args:
        hospitals: records with a leaf "patient", whose numbers tell patients of one hospital apart.

    Raises:
        PrivacyError: the leaf is missing.
    """
    if not isinstance(hospitals.records, dict) or PATIENT not in hospitals.records:
        raise _unnumbered(hospitals.names[0])
    numbers = np.zeros_like(hospitals.records[PATIENT])
    for row, count in enumerate(hospitals.counts):
        numbers[row, :count] = np.unique(hospitals.records[PATIENT][row, :count], return_inverse=True)[1]
    return Hospitals(hospitals.names, hospitals.records | {PATIENT: numbers}, hospitals.counts)


def patients_of(hospitals: HospitalSource) -> tuple[tuple[str, int], ...]:
    """Returns name and number of patients of each hospital, read one hospital at a time.

    Raises:
        PrivacyError: records do not say whose they are, or the numbers have gaps.
    """
    found = []
    for index, name in enumerate(hospitals.names):
        if isinstance(hospitals, Hospitals):
            records = jax.tree.map(lambda leaf, index=index: leaf[index], hospitals.records)
        else:
            records = jax.tree.map(lambda leaf: leaf[0], hospitals.take(np.array([index])))
        if not isinstance(records, dict) or PATIENT not in records:
            raise _unnumbered(name)
        found.append((name, count_patients(records[PATIENT][: hospitals.counts[index]], hospital=name)))
    return tuple(found)


def _unnumbered(hospital: str) -> PrivacyError:
    remedy = f"{hospital}'s records have no leaf \"{PATIENT}\", the number of each record's patient; add it"
    return PrivacyError("privacy.unit", "patient", remedy)


def plan_of_task(
    task: str, hospitals: HospitalSource, privacy: PrivacyConfig, *, rounds: int, epochs: int
) -> PrivacyPlan:
    """Returns the plan of a run that has this task alone.

    Raises:
        PrivacyError: as `PrivacyPlan.build` and `patients_of`.
    """
    patients = patients_of(hospitals) if privacy.unit == "patient" else ()
    stage = Stage(task, rounds, epochs, patients)
    return PrivacyPlan.build(privacy, num_hospitals=len(hospitals), stages=(stage,))
