"""The study folder: whose it is, what it survives, and a split that keeps patients apart."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsfl.config import ClassificationStage, DataConfig, StudyConfig
from capsfl.federated.hospitals import stack_hospitals
from capsfl.federated.patients import number_patients, patients_of, records_by_hospital
from capsfl.learning.patients import Patient, number_people
from capsfl.membership import MembershipError
from capsfl.study import (
    StudyFolder,
    StudyFolderError,
    disk_errors,
    load_study_config,
    split_patients,
    study_hospitals,
    study_weights,
    write_json,
)
from capsfl.training.checks import weights_of


def study(out: Path, **changes: object) -> StudyConfig:
    """A configuration with a run folder."""
    return StudyConfig.example().model_copy(update={"out": str(out), **changes})


def patient(number: int, hospital: str, label: int | None, split: str | None = None) -> Patient:
    """A patient without a volume worth the name."""
    voxel = np.zeros((1, 1, 1), np.float32)
    return Patient(
        name=f"{hospital}-{number:03d}",
        hospital=hospital,
        scanner="",
        label=label,
        hu=voxel,
        body=voxel > 0,
        truth=voxel > 0,
        spacing_mm=(1.0, 1.0, 1.0),
        split=split,
    )


def begin(folder: Path) -> None:
    """Leaves what a training leaves first: its ledger's head."""
    (folder / "federated" / "ledger").mkdir(parents=True)
    (folder / "federated" / "ledger" / "head").touch()


def test_a_folder_is_founded_once_and_then_resumed(tmp_path: Path):
    config = study(tmp_path / "run")
    with StudyFolder.open(config).stage("ingest"):
        pass
    with StudyFolder.open(config).stage("federated"):
        pass
    record = json.loads((tmp_path / "run" / "study.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == ["ingest", "federated"]
    assert load_study_config(tmp_path / "run") == config


def test_the_time_of_a_resumed_stage_adds_up(tmp_path: Path):
    config = study(tmp_path)
    seconds = []
    for _ in range(2):
        with StudyFolder.open(config).stage("ingest"):
            sum(range(200_000))
        (stage,) = json.loads((tmp_path / "study.json").read_text())["stages"]
        seconds.append(stage["seconds"])
    assert 0 < seconds[0] < seconds[1]


def test_a_folder_where_a_run_is_at_work_is_refused_by_name_and_free_when_it_has_ended(tmp_path: Path):
    config = study(tmp_path / "run")
    message = "another `capsfl train` is at work in it; wait for it to end"
    with StudyFolder.open(config), pytest.raises(StudyFolderError, match=message):
        StudyFolder.open(config)
    with StudyFolder.open(config):
        pass


def test_a_kill_while_a_folder_is_founded_leaves_one_that_can_be_founded(tmp_path: Path):
    config = study(tmp_path)
    StudyFolder.open(config)
    (tmp_path / "study.json").rename(tmp_path / ".study.json.partial")
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".study.json.partial"}
    StudyFolder.open(config)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "study.json"}


def test_hospitals_that_come_or_go_between_two_starts_are_refused_until_the_study_has_places(tmp_path: Path):
    with StudyFolder.open(study(tmp_path)) as folder:
        assert folder.seat(["A", "B"], places=None) == ("A", "B")
        assert folder.seat(["A", "C"], places=None) == ("A", "C"), "nothing was trained yet"
    begin(tmp_path)
    with StudyFolder.open(study(tmp_path)) as folder:
        with pytest.raises(MembershipError, match=f"{tmp_path}: begun with the hospitals A, C, .* B joined and C left"):
            folder.seat(["A", "B"], places=None)
        assert folder.seat(["A", "B"], places=3) == ("A", "C", "B")
    with StudyFolder.open(study(tmp_path)) as folder:
        assert folder.seat(["B"], places=3) == ("A", "C", "B")
    assert study_hospitals(tmp_path) == ("B",)


def test_a_folder_with_a_training_in_it_belongs_to_its_configuration(tmp_path: Path):
    StudyFolder.open(study(tmp_path))
    StudyFolder.open(study(tmp_path, seed=1))  # nothing was trained yet
    assert load_study_config(tmp_path).seed == 1
    begin(tmp_path)
    with pytest.raises(StudyFolderError, match=r"made by another configuration \(seed was 1, is 2\); choose another"):
        StudyFolder.open(study(tmp_path, seed=2))
    StudyFolder.open(study(tmp_path, seed=1))
    assert load_study_config(tmp_path).seed == 1


def test_the_weights_a_study_begins_with_are_recorded_and_must_stay_what_they_were(tmp_path: Path):
    file = tmp_path / "weights.h5"
    file.write_bytes(b"one")
    model = {"name": "resnet50", "weights": str(file)}
    stage = ClassificationStage.model_validate({"image_size": 64, "model": model | {"image_size": 64}})
    config = study(tmp_path / "run", segmentation=None, classification=stage)
    found = weights_of(config)
    assert found == {str(file): hashlib.sha256(b"one").hexdigest()}
    StudyFolder.open(config).keep_weights(found)
    file.write_bytes(b"two")
    StudyFolder.open(config).keep_weights(weights_of(config))  # nothing was trained yet
    assert study_weights(tmp_path / "run") == weights_of(config)
    begin(tmp_path / "run")
    StudyFolder.open(config).keep_weights(weights_of(config))
    with pytest.raises(StudyFolderError, match=rf"{file}: not the weights that .* began with"):
        StudyFolder.open(config).keep_weights(found)
    file.unlink()
    StudyFolder.open(config).keep_weights(weights_of(config))
    assert study_weights(tmp_path / "run") == {str(file): hashlib.sha256(b"two").hexdigest()}
    assert weights_of(study(tmp_path / "other")) == {}


def test_a_difference_deep_inside_is_named_with_both_values(tmp_path: Path):
    config = study(tmp_path)
    StudyFolder.open(config)
    begin(tmp_path)
    assert config.segmentation is not None
    deeper = config.segmentation.model.model_copy(update={"width": 0.5})
    other = config.model_copy(update={"segmentation": config.segmentation.model_copy(update={"model": deeper})})
    with pytest.raises(StudyFolderError, match=r"segmentation\.model\.width was 1\.0, is 0\.5"):
        StudyFolder.open(other)


def test_another_place_and_another_layout_are_no_other_configuration(tmp_path: Path):
    config = study(tmp_path / "here")
    StudyFolder.open(config)
    begin(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    layout = config.devices.model_copy(update={"parallel": "shard_map"})
    StudyFolder.open(study(tmp_path / "there", devices=layout))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"name": "x"}', ""])
def test_a_damaged_record_is_named_and_left_alone(tmp_path: Path, content: str):
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(StudyFolderError, match=r"study\.json"):
        StudyFolder.open(study(tmp_path))
    assert (tmp_path / "study.json").read_text() == content


def test_a_study_of_another_version_is_named_with_that_version(tmp_path: Path):
    StudyFolder.open(study(tmp_path))
    record = json.loads((tmp_path / "study.json").read_text())
    record["configuration"]["kappa"] = 1
    record["versions"]["capsfl"] = "9.9"
    (tmp_path / "study.json").write_text(json.dumps(record))
    with pytest.raises(StudyFolderError, match=r"install capsfl 9\.9"):
        load_study_config(tmp_path)


def test_a_place_that_is_a_file_is_named(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(StudyFolderError, match="cannot be written"):
        StudyFolder.open(study(tmp_path / "run"))


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"a": float("nan")})

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_an_error_of_the_disk_without_a_name_gets_the_folders(tmp_path: Path):
    with (
        pytest.raises(StudyFolderError, match=f"{tmp_path}: No space left on device; free space"),
        disk_errors(tmp_path),
    ):
        raise OSError(28, os.strerror(28))
    named = OSError(28, os.strerror(28), "volume")
    with pytest.raises(OSError, match="volume") as error, disk_errors(tmp_path):
        raise named
    assert error.value is named


@given(
    sizes=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=4),
    test=st.floats(0, 0.99),
    validation=st.floats(0, 0.99),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_split_is_a_partition_by_hospital_and_class_in_the_asked_shares(
    sizes: list[tuple[int, int]], test: float, validation: float, seed: int
):
    patients = [
        patient(100 * label + number, chr(65 + hospital), label)
        for hospital, counts in enumerate(sizes)
        for label, count in enumerate(counts)
        for number in range(count)
    ]
    config = DataConfig(test_fraction=test, validation_fraction=validation)
    held = {(h, c): round(test * n) for h, counts in enumerate(sizes) for c, n in enumerate(counts)}
    if not 0 < sum(held.values()) < len(patients):
        with pytest.raises(ValueError, match=r"data\.test_fraction"):
            split_patients(patients, config, seed=seed)
        return
    split = split_patients(patients, config, seed=seed)
    names = [p.name for part in split for p in part]
    assert sorted(names) == sorted(p.name for p in patients)
    assert len(set(names)) == len(names)
    for (hospital, label), count in held.items():
        assert sum((p.hospital, p.label) == (chr(65 + hospital), label) for p in split.test) == count
    again = split_patients(list(reversed(patients)), config, seed=seed)
    assert [[p.name for p in part] for part in again] == [[p.name for p in part] for part in split]


@given(
    scans=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(0, 1)), min_size=12, max_size=30),
    fixed=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_all_scans_of_a_person_have_one_use(scans: list[tuple[int, int, int]], fixed: bool, seed: int):
    """Whatever hospital and class they are listed under, and where the column is filled in for some of them."""
    patients = [
        replace(
            patient(number, "ABC"[hospital], label, ("train", "test", None)[number % 3] if fixed else None),
            person=f"person-{who}" if who else None,
        )
        for number, (who, hospital, label) in enumerate(scans)
    ]
    try:
        split = split_patients(patients, DataConfig(test_fraction=0.4, validation_fraction=0.2), seed=seed)
    except ValueError:  # all scans may be of one person
        return
    uses: dict[tuple[str, str], set[str]] = {}
    for name, part in split._asdict().items():
        for one in part:
            uses.setdefault(one.whose, set()).add(name)
    assert all(len(names) == 1 for names in uses.values())
    assert sorted(p.key for part in split for p in part) == sorted(p.key for p in patients)


def test_a_patient_of_privacy_is_a_person_with_all_scans():
    patients = [patient(n, "A", 1) for n in range(4)] + [patient(0, "B", 0)]
    patients = [replace(p, person="P" if n in (1, 3) else None) for n, p in enumerate(patients)]
    assert number_people(patients).tolist() == [0, 1, 2, 1, 3]
    records = records_by_hospital(patients, lambda p: {"x": np.zeros((2, 1))}, numbered=True)
    assert records["A"]["patient"].tolist() == [0, 0, 1, 1, 2, 2, 1, 1]
    hospitals = number_patients(stack_hospitals(records))
    assert patients_of(hospitals) == (("A", 3), ("B", 1))


def test_the_manifests_split_is_kept(tmp_path: Path):
    patients = [patient(n, "A", n % 2, ("train", "validation", "test")[n % 3]) for n in range(9)]
    split = split_patients(patients, DataConfig(), seed=0)
    assert {p.split for p in split.train} == {"train"}
    assert {p.split for p in split.validation} == {"validation"}
    assert {p.split for p in split.test} == {"test"}
    assert sum(map(len, split)) == 9


@pytest.mark.parametrize(("fraction", "part"), [(0.0, "test on"), (0.99, "train on")])
def test_a_split_that_leaves_a_part_empty_is_refused(fraction: float, part: str):
    with pytest.raises(ValueError, match=rf"data\.test_fraction = {fraction}: no patient left to {part} among 4"):
        split_patients([patient(n, "A", 1) for n in range(4)], DataConfig(test_fraction=fraction), seed=0)
