"""Records of one stage of an ingested study, as `capsfl train` makes them, to be swept over."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from capsfl.audit import run_places
from capsfl.checkpoint import latest_parameters
from capsfl.config import StudyConfig
from capsfl.ct.ingest import read_index
from capsfl.evaluation import Segmented, seed_of
from capsfl.federated.hospitals import Hospitals, stack_hospitals
from capsfl.learning.classification import ClassificationConfig, make_classification_task, masked_slices
from capsfl.learning.patients import Patient, load_patient
from capsfl.learning.segmentation import SegmentationConfig, Segmenter, cut_patches, make_segmentation_task
from capsfl.learning.tasks import Task
from capsfl.ledger.chain import Ledger
from capsfl.study import load_study_config, split_patients

Records = dict[str, np.ndarray]


@lru_cache(maxsize=4)
def build_stage(
    folder: str, stage: str, config: SegmentationConfig | ClassificationConfig
) -> tuple[Hospitals, Hospitals, Callable[[int], Task]]:
    """Returns training records, validation records and the task of a stage.

    Patients and their split are the study's own; its test patients are left alone, so that a setting chosen by the
    sweep can still be judged on them.

    Args:
        folder: that `capsfl train` wrote, at least as far as its volumes; for `classification`, a finished one.
        stage: `segmentation` or `classification`.
        config: network and records of the stage.

    Raises:
        ValueError: no study there, no volumes yet, or nobody to validate on; the message names the folder.
    """
    study = Path(folder)
    own = load_study_config(study)
    entries = read_index(study / "volumes")
    patients = [load_patient(entry, field=own.data.field) for entry in entries]
    known = [patient for patient in patients if patient.truth is not None or patient.label is not None]
    split = split_patients(known, own.data, seed=own.seed)
    if isinstance(config, SegmentationConfig):
        chosen = config
        parts = [
            _by_hospital(
                (p for p in part if p.truth is not None),
                lambda p: cut_patches(p, chosen, seed=seed_of(own.seed, p.key)),
            )
            for part in (split.train, split.validation)
        ]

        def make_task(seed: int) -> Task:
            return make_segmentation_task(chosen, seed=seed)
    else:
        stage_config = config
        scans = _trained_segmentation(study, own)

        def records_of(patient: Patient) -> Records:
            images = masked_slices(patient.hu, scans.fused(patient), stage_config)
            return {"image": images, "label": np.full(len(images), patient.label, np.int32)}

        parts = [
            _by_hospital((p for p in part if p.label is not None), records_of)
            for part in (split.train, split.validation)
        ]

        def make_task(seed: int) -> Task:
            return make_classification_task(stage_config, seed=seed)

    for part, name in zip(parts, ("train on", "validate on"), strict=True):
        if not part:
            raise ValueError(f"problem.folder = {folder}: no patient to {name} in stage {stage}; split others")
    return stack_hospitals(parts[0]), stack_hospitals(parts[1]), make_task


def _trained_segmentation(study: Path, config: StudyConfig) -> Segmented:
    """The segmentation of the study's first arm, which masks the slices the classifier sees."""
    arm, place = run_places(study, config)[0]
    marking = config.arm(arm).segmentation
    assert marking is not None  # a study has it in front of classification
    task = make_segmentation_task(marking, seed=config.seed)
    with Ledger.open(study / place / "ledger") as ledger:
        recorded = ledger.rounds()
    weights = latest_parameters(study / place / "checkpoints" / task.name, task.parameters, recorded)
    return Segmented(Segmenter(task, marking), weights)


def _by_hospital(patients: Iterable[Patient], records_of: Callable[[Patient], Any]) -> dict[str, Any]:
    found: dict[str, list[Any]] = {}
    for patient in patients:
        found.setdefault(patient.hospital, []).append(records_of(patient))
    return {name: _join(rows) for name, rows in sorted(found.items())}


def _join(rows: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
