"""Records of one stage of an ingested study, as `capsfl train` makes them, to be swept over."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from capsfl.audit import run_places
from capsfl.checkpoint import latest_parameters
from capsfl.config import StudyConfig
from capsfl.ct.ingest import read_index
from capsfl.evaluation import Images, Segmented, seed_of
from capsfl.federated.hospitals import Hospitals, stack_hospitals
from capsfl.federated.patients import records_by_hospital
from capsfl.learning.classification import ClassificationConfig, make_classification_task
from capsfl.learning.fusion import load_fusion
from capsfl.learning.patients import load_patient
from capsfl.learning.segmentation import SegmentationConfig, Segmenter, cut_patches, make_segmentation_task
from capsfl.learning.tasks import Task
from capsfl.ledger.chain import Ledger
from capsfl.study import load_study_config, split_patients
from capsfl.sweeps.patients import patient_records, score_patients


@lru_cache(maxsize=4)
def build_stage(
    folder: str, stage: str, config: SegmentationConfig | ClassificationConfig
) -> tuple[Hospitals, Hospitals, Callable[[int], Task]]:
    """Returns training records, validation records and the task of a stage.

    The classification is scored by patient, segmentation by patch. Patients and their split are the study's own; its
    test patients are left alone, so that a setting chosen by the sweep can still be judged on them.

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
    patients = [load_patient(entry, field=own.data.field, volumes=own.data.volumes) for entry in entries]
    known = [patient for patient in patients if patient.truth is not None or patient.label is not None]
    split = split_patients(known, own.data, seed=own.split_seed)
    if isinstance(config, SegmentationConfig):
        chosen = config
        parts = [
            records_by_hospital(
                (p for p in part if p.truth is not None),
                lambda p: cut_patches(p, chosen, seed=seed_of(own.seed, p.key)),
            )
            for part in (split.train, split.validation)
        ]

        def train_patches(seed: int) -> Task:
            return make_segmentation_task(chosen, seed=seed)

        make_task: Callable[[int], Task] = train_patches
    else:
        stage_config = config
        images = Images(stage_config, None if own.segmentation is None else _trained_segmentation(study, own))
        labelled = [[p for p in part if p.label is not None] for part in (split.train, split.validation)]
        parts = [
            records_by_hospital(labelled[0], images.records),
            patient_records(labelled[1], images, most=stage_config.slices_per_scan),
        ]

        def train_slices(seed: int) -> Task:
            return make_classification_task(stage_config, seed=seed)

        make_task = score_patients(train_slices, top=stage_config.top_slices)

    for part, name in zip(parts, ("train on", "validate on"), strict=True):
        if not part:
            raise ValueError(f"problem.folder = {folder}: no patient to {name} in stage {stage}; split others")
    return stack_hospitals(parts[0]), stack_hospitals(parts[1]), make_task


def _trained_segmentation(study: Path, config: StudyConfig) -> Segmented:
    """The segmentation of the study's first arm, which masks the slices the classifier sees."""
    arm, place = run_places(study, config)[0]
    marking = config.arm(arm).segmentation
    assert marking is not None
    task = make_segmentation_task(marking, seed=config.seed)
    with Ledger.open(study / place / "ledger") as ledger:
        recorded = ledger.rounds()
    weights = latest_parameters(study / place / "checkpoints" / task.name, task.parameters, recorded)
    fusion = load_fusion(study / place, marking.planes) if marking.fusion == "learned" else None
    return Segmented(Segmenter(task, marking, fusion_weights=fusion), weights)
