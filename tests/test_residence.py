"""Records kept on disk: the same hospitals, for federated arms alone, and never a part of the study's identity."""

import numpy as np
import pytest

from capsfl.config import ArmConfig, DataConfig, SegmentationStage, StudyConfig
from capsfl.ct.phantom import PhantomConfig
from capsfl.federated import Hospitals, StoredHospitals
from capsfl.training.run import Run


def study(residence: str, *, scaffold: bool = False) -> StudyConfig:
    return StudyConfig(
        phantom=PhantomConfig(),
        data=DataConfig.model_validate({"residence": residence}),
        segmentation=SegmentationStage(scaffold=scaffold),
    )


RECORDS = {name: {"x": np.full((count, 2), count, np.float32)} for name, count in (("A", 3), ("B", 1), ("C", 2))}


def run(folder, partition: str, residence: str) -> Run:
    arm = ArmConfig.model_validate({"partition": partition})
    hospitals = ("B",) if partition == "local" else ("A", "B", "C")
    return Run(folder, study(residence), arm, hospitals, "chain")


def test_a_federated_arm_reads_from_disk_what_it_would_have_in_memory(tmp_path):
    memory = run(tmp_path, "hospitals", "memory").arrange(RECORDS, "segmentation")
    assert not list(tmp_path.iterdir())
    asked = run(tmp_path, "hospitals", "disk")
    for _ in range(2):  # a second start finds the store of the first, and writes its own
        disk = asked.arrange(RECORDS, "segmentation")
        assert isinstance(disk, StoredHospitals)
        assert isinstance(memory, Hospitals)
        assert (tuple(disk.names), disk.capacity, disk.counts.tolist()) == (memory.names, 3, [3, 1, 2])
        cohort = np.array([2, 0, 1]), np.array([True, True, False])
        assert np.array_equal(disk.take(*cohort)["x"], memory.take(*cohort)["x"])
    assert (tmp_path / "records" / "segmentation" / "hospitals.json").exists()


@pytest.mark.parametrize("partition", ["pooled", "local"])
def test_who_takes_part_in_every_round_stays_in_memory(tmp_path, partition):
    hospitals = run(tmp_path, partition, "disk").arrange(RECORDS, "segmentation")
    assert isinstance(hospitals, Hospitals)
    assert not list(tmp_path.iterdir())


def test_a_study_may_be_resumed_with_its_records_elsewhere():
    assert study("disk").digest() == study("memory").digest()
    other = study("disk").model_copy(update={"seed": 1})
    assert other.digest() != study("disk").digest()


def test_control_variates_and_records_on_disk_are_refused_before_anything_is_read():
    assert study("memory", scaffold=True)
    with pytest.raises(ValueError, match=r'data\.residence = "disk": segmentation\.scaffold keeps'):
        study("disk", scaffold=True)
