"""Phantom hospitals of a sweep: drawn and ingested once; each study then trains on the first few of them."""

import fcntl
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from capsfl.config import DataConfig
from capsfl.ct.ingest import ingest, read_index
from capsfl.ct.normalize import VolumeConfig
from capsfl.ct.phantom import PhantomConfig, write_hospitals
from capsfl.evaluation import Images
from capsfl.federated.hospitals import Hospitals, select_hospitals, stack_hospitals
from capsfl.federated.patients import records_by_hospital
from capsfl.learning.classification import ClassificationConfig, make_classification_task
from capsfl.learning.patients import load_patient
from capsfl.learning.tasks import Task
from capsfl.study import split_patients
from capsfl.sweeps.patients import patient_records, score_patients


def build_phantom(
    folder: str,
    phantom: PhantomConfig,
    *,
    hospitals: int | None,
    field: tuple[int, int, int] | None,
    test_fraction: float,
    config: ClassificationConfig,
) -> tuple[Hospitals, Hospitals, Callable[[int], Task]]:
    """Returns training records of the first hospitals, the test patients of all hospitals, and the task.

    Each hospital brings its own patients: with another hospital comes more to learn from, while the test patients stay
    the same, those of hospitals that do not take part among them.

    Args:
        folder: where the phantom is written, or was.
        phantom: its hospitals and patients.
        hospitals: how many of them train; all when None.
        field: central voxels (z, y, x) that are looked at.
        test_fraction: of every hospital's patients.
        config: network and slices.

    Raises:
        ValueError: more hospitals than the phantom has, one of them without a patient to train on, or a folder that
            holds another phantom or cannot be written.
    """
    if hospitals is not None and hospitals > phantom.hospitals:
        raise ValueError(
            f"problem.hospitals = {hospitals}: the phantom has {phantom.hospitals}; name fewer, or raise "
            "problem.phantom.hospitals"
        )
    key: Any = phantom, field, test_fraction, config
    train, test = _records(folder, *key)
    if len(train) < phantom.hospitals:
        raise ValueError(
            f"problem.test_fraction = {test_fraction}: only {len(train)} of {phantom.hospitals} hospitals have a "
            "patient left to train on; hold out fewer, or raise problem.phantom.patients"
        )

    def make_task(seed: int) -> Task:
        return make_classification_task(config, seed=seed)

    return select_hospitals(train, train.names[:hospitals]), test, score_patients(make_task, top=config.top_slices)


@lru_cache(maxsize=4)
def _records(
    folder: str,
    phantom: PhantomConfig,
    field: tuple[int, int, int] | None,
    test_fraction: float,
    config: ClassificationConfig,
) -> tuple[Hospitals, Hospitals]:
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes the first one draws
        source = write_hospitals(place / "phantom", config=phantom, progress=False)
        ingest(source, place / "volumes", config=VolumeConfig(), progress=False)
    patients = [load_patient(entry, field=field) for entry in read_index(place / "volumes")]
    data = DataConfig(test_fraction=test_fraction, validation_fraction=0.0)
    try:
        split = split_patients(patients, data, seed=phantom.seed)
    except ValueError as error:
        raise ValueError(str(error).replace("data.", "problem.", 1)) from None
    images = Images(config, None)
    train = stack_hospitals(records_by_hospital(split.train, images.records))
    return train, stack_hospitals(patient_records(split.test, images, most=config.slices_per_scan))
