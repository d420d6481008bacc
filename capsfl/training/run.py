"""What a run is: one training of a study, its folder, its hospitals, its share of the patients, its privacy plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from capsfl.audit import chain_of
from capsfl.config import ArmConfig, StudyConfig
from capsfl.federated.hospitals import (
    HospitalSource,
    pool_hospitals,
    seat_hospitals,
    select_hospitals,
    stack_hospitals,
)
from capsfl.federated.patients import number_patients
from capsfl.federated.store_writer import rewrite_hospitals_store
from capsfl.federated.stored import open_hospitals_store
from capsfl.learning.patients import Patient
from capsfl.membership import vacant_names
from capsfl.privacy.patient_plan import Stage
from capsfl.privacy.plan import PrivacyPlan
from capsfl.processes import by_first
from capsfl.study import Split

RECORDS = "records"
"""Folder in a run's for the records that lie on disk while it trains."""
NEEDS: Mapping[str, tuple[str, Callable[[Patient], bool]]] = {
    "segmentation": ("mask", lambda patient: patient.truth is not None),
    "classification": ("label", lambda patient: patient.label is not None),
}
"""What a patient must have for a stage: the manifest's column, and whether it is there."""


@dataclass(frozen=True)
class Run:
    """One training: its folder, its own configuration, and the hospitals whose records it sees.

    An arm with a run for every hospital names it by `member`: the hospital that trains alone, or that is left out.
    """

    folder: Path
    config: StudyConfig
    arm: ArmConfig
    hospitals: tuple[str, ...]
    chain_id: str
    member: str | None = None
    places: tuple[str, ...] = ()
    profile: bool = False

    @property
    def place(self) -> str:
        """The run's folder within the study: `arm`, or `arm/hospital`."""
        return f"{self.arm.name}/{self.member}" if self.member else self.arm.name

    @property
    def holders(self) -> tuple[str, ...]:
        """Who holds records in this run: the hospitals, or the pool."""
        return ("pooled",) if self.arm.partition == "pooled" else self.hospitals

    @property
    def protects_patients(self) -> bool:
        """Whether the unit of privacy is the patient, so that every record has to say whose it is."""
        return self.config.privacy.unit == "patient"

    def share_of(self, split: Split) -> Split:
        """Whom this run validates and tests on: everybody, with two exceptions.

        Where a hospital is left out, its test patients alone; nor does it help to choose a threshold or a fusion. A
        hospital that trains alone chooses them by its own validation patients, since it has no others.
        """
        if self.arm.partition == "local":
            return split._replace(validation=tuple(p for p in split.validation if p.hospital in self.hospitals))
        if self.arm.partition != "leave-one-out":
            return split
        return Split(
            tuple(p for p in split.train if p.hospital != self.member),
            tuple(p for p in split.validation if p.hospital != self.member),
            tuple(p for p in split.test if p.hospital == self.member),
        )

    def arrange(self, records: Mapping[str, Any], task: str) -> HospitalSource:
        """Stacks this run's share of all hospitals' records, and where asked for moves them to disk."""
        hospitals = select_hospitals(stack_hospitals(records), self.hospitals)
        hospitals = pool_hospitals(hospitals) if self.arm.partition == "pooled" else hospitals
        hospitals = number_patients(hospitals) if self.protects_patients else hospitals
        hospitals = seat_hospitals(hospitals, self.places) if self.places else hospitals
        if self.config.data.residence == "memory" or not self.arm.federates:
            return hospitals
        place = self.folder / RECORDS / task
        by_first("the records on disk", lambda: rewrite_hospitals_store(place, hospitals))
        return open_hospitals_store(place)


def plan_runs(config: StudyConfig, study: Path, split: Split, *, roster: Sequence[str] = ()) -> list[Run]:
    """Lists the trainings of a study: one per arm, or for `local` and `leave-one-out` one per hospital.

    Args:
        config: the whole configuration.
        study: the study's folder.
        split: the patients.
        roster: who has, or once had, the places of the study, where hospitals join and leave.
    """
    hospitals = tuple(sorted({patient.hospital for patient in split.train}))
    runs = []
    for arm in config.arms:
        for member in hospitals if arm.has_members else (None,):
            place = f"{arm.name}/{member}" if member else arm.name
            holders = (member,) if arm.partition == "local" and member else hospitals
            if arm.partition == "leave-one-out":
                holders = tuple(name for name in hospitals if name != member)
            run = Run(study / place, config.arm(arm), arm, holders, chain_of(config, place), member)
            if config.places is not None and arm.partition == "hospitals":
                run = replace(run, places=vacant_names(roster, config.places))
            runs.append(run)
    return runs


def plan_of_run(run: Run, split: Split) -> PrivacyPlan:
    """Returns the privacy plan of a run through all its stages.

    Raises:
        PrivacyError: the privacy section contradicts itself, the number of hospitals or that of their patients.
    """
    stages = []
    for task, stage in run.config.stages.items():
        _, takes = NEEDS[task]
        people: dict[str, set[tuple[str, str]]] = {holder: set() for holder in run.holders}
        for patient in split.train:
            if patient.hospital in run.hospitals and takes(patient):
                people["pooled" if run.arm.partition == "pooled" else patient.hospital].add(patient.whose)
        patients = tuple((holder, len(own)) for holder, own in people.items()) if run.protects_patients else ()
        stages.append(Stage(task, stage.rounds, stage.local.epochs, patients))
    return PrivacyPlan.build(run.config.privacy, num_hospitals=len(run.places or run.holders), stages=stages)
