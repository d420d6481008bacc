"""What cannot be used is refused in one line that names it and the remedy, and leaves nothing half-written."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imsave

from capsfl.checkpoint import Checkpoints
from capsfl.config import load_config
from capsfl.study import StudyFolder

pytestmark = pytest.mark.journey


def half_written(folder: Path) -> list[Path]:
    """What an interrupted write would leave below a folder."""
    words = ("partial", "tmp", ".new", ".old")
    return [path for path in folder.rglob("*") if any(word in path.name for word in words)]


@pytest.fixture
def bad_scans(tmp_path: Path, phantom: Path) -> Path:
    """Folders that hold no usable scan."""
    place = tmp_path / "scans"
    (place / "empty").mkdir(parents=True)
    (place / "pictures").mkdir()
    for number in range(3):
        imsave(place / "pictures" / f"{number}.png", np.zeros((8, 8)))
    shutil.copytree(phantom / "hospital-A" / "A-001", place / "truncated")
    victim = sorted((place / "truncated").iterdir())[2]
    victim.write_bytes(victim.read_bytes()[:-500])
    (place / "nothing.nii.gz").write_bytes(b"")
    (place / "manifest.csv").write_text("patient,hospital,image\np1,a,empty\n")
    return place


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("empty", "empty"),
        ("pictures", "png"),
        ("truncated", ".dcm"),
        ("nothing.nii.gz", "nothing.nii.gz"),
        ("manifest.csv", "empty"),
        ("absent", "no such file"),
    ],
)
def test_sources_without_a_scan_are_refused_by_name(bad_scans: Path, tmp_path: Path, refused, source, fault):
    message = refused("ingest", bad_scans / source, tmp_path / "out", "--processes", "1")
    assert str(bad_scans) in message
    assert fault in message.lower()
    assert "; " in message, "no remedy"
    assert not half_written(tmp_path / "out")
    assert not (tmp_path / "out" / "index.csv").exists()


@pytest.mark.parametrize(
    ("place", "fault"),
    [("ge-tilt-variable", "gantry tilt of 18.5 degrees"), ("localizer", "localizer")],
)
def test_real_series_that_are_no_volume_are_refused_by_name(shared_data, tmp_path: Path, refused, place, fault):
    source = shared_data / place
    if place == "localizer":
        source = tmp_path / "localizer"
        source.mkdir()
        shutil.copy(shared_data / "odd-dicom/misc/GE-chest-localizer-JPEG70.dcm", source)
    message = refused("ingest", source, tmp_path / "out", "--processes", "1")
    assert str(source) in message
    assert fault in message.lower()
    assert not half_written(tmp_path / "out")


def test_a_prediction_of_a_bad_scan_leaves_no_folder(study, bad_scans: Path, tmp_path: Path, refused):
    message = refused("predict", study.run, bad_scans / "pictures", "--out", tmp_path / "prediction")
    assert str(bad_scans / "pictures") in message
    assert not (tmp_path / "prediction").exists()


def test_training_on_a_bad_scan_names_it_and_the_same_folder_serves_when_it_is_mended(
    bad_scans: Path, configuration, tmp_path: Path, refused
):
    config = configuration(tmp_path / "run")
    refused("train", config, "--data.source", bad_scans / "manifest.csv")
    assert not half_written(tmp_path / "run")
    assert not (tmp_path / "run" / "report.html").exists()
    # Mended, the folder is refused for the next mistake, not for what the first one left.
    assert "data.field" in refused("train", config, "--data.field", "36", "64", "64")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("privacy.clip-norm", "nan"),
        ("privacy.clip-norm", "0"),
        ("privacy.noise-multiplier", "-1"),
        ("privacy.delta", "0"),
        ("privacy.cohort", "0"),
        ("segmentation.rounds", "0"),
        ("segmentation.local.learning-rate", "-0.1"),
        ("segmentation.local.batch-size", "0"),
        ("segmentation.server.learning-rate", "inf"),
        ("devices.chunk", "-1"),
        ("devices.coordinator", "node01"),
        ("places", "0"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused_by_its_dotted_name(
    configuration, tmp_path: Path, refused, field: str, value: str
):
    message = refused("train", configuration(tmp_path / "run"), f"--{field}", value)
    assert field.replace("-", "_").rpartition(".")[2] in message.replace("-", "_")
    assert value in message.casefold()
    assert not (tmp_path / "run").exists()


@pytest.fixture
def ingested(study, tmp_path: Path) -> Path:
    """A study folder in which nothing is trained, and the scans are volumes already."""
    place = tmp_path / "run"
    place.mkdir()
    shutil.copy(study.run / "study.json", place)
    shutil.copytree(study.run / "volumes", place / "volumes")
    return place


def test_a_cohort_larger_than_the_federation_is_refused_before_training(ingested: Path, configuration, refused):
    words = ("--privacy.sampler", "poisson", "--privacy.cohort", "5")
    message = refused("train", configuration(ingested), *words)
    assert "privacy.cohort = 5: must lie between 1 and the number of hospitals (3)" in message
    assert not (ingested / "federated").exists()


def test_more_hospitals_than_places_are_refused_by_name(ingested: Path, configuration, refused):
    message = refused("train", configuration(ingested), "--places", "2")
    assert "places = 2: 0 are taken" in message
    assert "hospital-A, hospital-B, hospital-C would join" in message
    assert not (ingested / "federated").exists()


def test_a_label_outside_the_classes_is_refused_by_its_patient(phantom: Path, configuration, tmp_path: Path, refused):
    manifest = tmp_path / "manifest.csv"
    lines = (phantom / "manifest.csv").read_text().splitlines()
    column = lines[0].split(",").index("label")
    cells = lines[1].split(",")
    cells[column] = "2"
    manifest.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]))
    message = refused("train", configuration(tmp_path / "run"), "--data.source", manifest, "--data.root", phantom)
    patient, hospital = (cells[lines[0].split(",").index(column)] for column in ("patient", "hospital"))
    assert f"classification.classes = 2: {hospital}/{patient} has label 2" in message
    assert "set classification.classes = 3" in message


@pytest.mark.parametrize("field", ["seed", "segmentation.rounds", "privacy.noise-multiplier"])
def test_a_folder_made_by_another_configuration_is_refused_naming_field_and_values(study, refused, field):
    message = refused("train", study.config, f"--{field}", "7")
    assert str(study.run) in message
    assert field.replace("-", "_") in message
    assert "7" in message
    assert "choose another `out`" in message


def test_a_folder_that_holds_something_else_is_not_touched(configuration, tmp_path: Path, refused):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("years of work")
    message = refused("train", configuration(out))
    assert str(out) in message
    assert [path.name for path in out.iterdir()] == ["chapter.tex"]


def test_a_study_that_another_command_is_at_work_in_is_refused_by_name(study_copy: Path, configuration, refused):
    config = configuration(study_copy)
    with StudyFolder.open(load_config(config)):
        message = refused("train", config)
    assert str(study_copy) in message
    assert "another `capsfl train` is at work in it; wait for it to end or choose another `out`" in message


@pytest.mark.parametrize("command", ["predict", "report", "verify"])
def test_a_folder_without_a_study_is_named(command: str, tmp_path: Path, refused, phantom: Path):
    message = refused(command, tmp_path, *([phantom / "hospital-A" / "A-001"] if command == "predict" else []))
    assert str(tmp_path) in message
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """An empty place for a file system of its own, unmounted at the end."""
    place = tmp_path / "mounted"
    place.mkdir()
    yield place
    subprocess.run(["umount", str(place)], check=False, capture_output=True)


def mount(place: Path, options: str) -> None:
    """Mounts a tmpfs, or skips: that takes rights that not every machine gives."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")


def test_a_read_only_output_folder_is_named_by_every_command(
    mounted: Path, study, phantom: Path, configuration, tmp_path: Path, refused
):
    mount(mounted, "size=1m,ro")
    config = configuration(tmp_path / "run")
    series = phantom / "hospital-A" / "A-001"
    for words in (
        ("train", config, "--out", mounted / "run"),
        ("ingest", series, mounted / "volumes", "--processes", "1"),
        ("phantom", mounted / "phantom", "--processes", "1"),
        ("predict", study.run, series, "--out", mounted / "prediction"),
    ):
        message = refused(*words)
        assert str(mounted) in message, words
        assert "read-only file system" in message.lower()


def used_bytes(folder: Path) -> int:
    """What a folder's files take on a tmpfs, which gives out pages of 4096 bytes."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.mark.torture
def test_a_full_disk_is_named_and_the_same_command_goes_on_when_there_is_room(
    mounted: Path, study, configuration, tmp_path: Path, capsfl, here
):
    mount(mounted, "size=100k")
    out, config = mounted / "run", configuration(tmp_path / "run")
    volumes, training = used_bytes(study.run / "volumes"), used_bytes(study.run / "federated")
    # In training ledger, curves and checkpoints are written: any of them may be the first to find the disk full.
    stops = [(volumes // 3, ("run/volumes",)), (volumes + training // 3, ("run",))]
    if "CAPSFL_TORTURE" in os.environ:
        stops += [(volumes + share * training // 10, ("run",)) for share in (5, 7, 9)]
    for size, stopped_at in stops:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(mounted)], check=True)
        line = capsfl("train", config, "--out", out, expect=2).err
        assert len(line.splitlines()) == 1, line
        assert any(str(mounted / place) in line for place in stopped_at), line
        assert "No space left on device" in line
        assert "free space" in line
        assert not [path for path in half_written(out) if "orbax" not in path.name]
    subprocess.run(["mount", "-o", "remount,size=500m", str(mounted)], check=True)
    capsfl("train", config, "--out", out)
    assert not half_written(out)
    assert here("verify", out).code == 0


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO])
def test_an_error_of_the_disk_at_a_checkpoint_names_it_and_leaves_the_rounds_before(
    study_copy: Path, configuration, refused, monkeypatch: pytest.MonkeyPatch, fault: int
):
    (study_copy / "federated" / "results.json").unlink()
    shutil.rmtree(study_copy / "federated" / "checkpoints" / "classification" / "2")

    def fail(*_: object, **__: object) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", fail)
    message = refused("train", configuration(study_copy))
    assert str(study_copy / "federated/checkpoints/classification/2") in message
    assert os.strerror(fault) in message
    assert "run again to resume" in message
    checkpoints = Checkpoints(study_copy / "federated" / "checkpoints" / "classification")
    assert checkpoints.rounds() == [1]
    checkpoints.close()


@pytest.mark.parametrize(
    "words",
    [
        ("train", "absent.toml"),
        ("tarin", "configs/demo.toml"),
        ("epsilon", "--hospitals", "10", "--rounds", "5", "--noise-multiplier", "-1"),
    ],
)
def test_a_process_refuses_with_one_line_and_exit_code_2(capsfl, tmp_path: Path, words: tuple[str, ...]):
    answer = capsfl(*words, expect=2, cwd=tmp_path)
    assert len(answer.err.splitlines()) == 1, answer.err
    assert answer.out == ""
    assert list(tmp_path.iterdir()) == []
