"""The study folder: whose configuration it is, how long its stages took, how its patients are split."""

import fcntl
import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from capsfl.clock import Stopwatch
from capsfl.config import DataConfig, StudyConfig
from capsfl.learning.patients import Patient
from capsfl.membership import members_of, seat
from capsfl.processes import is_first, process_index

STRICTEST = ("test", "validation", "train")
LOCK = ".lock"
"""File whose lock the one process at work in a study holds."""


class StudyFolderError(ValueError):
    """A run folder that cannot be used; the message names it and the remedy."""


class Split(NamedTuple):
    """Patients by their use; no person is in two of them."""

    train: tuple[Patient, ...]
    validation: tuple[Patient, ...]
    test: tuple[Patient, ...]


class StudyFolder:
    """A study's folder with `study.json`; made by `StudyFolder.open`, a context manager that frees the folder.

    One run at a time: two would write the same volumes, curves and checkpoints. Of a run's processes the first one
    holds the lock.
    """

    def __init__(self, path: Path, record: dict[str, Any], lock: int | None) -> None:
        self.path = path
        self._record = record
        self._unlock = weakref.finalize(self, os.close, lock) if lock is not None else None

    def __enter__(self) -> "StudyFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._unlock is not None:
            self._unlock()

    @classmethod
    def open(cls, config: StudyConfig) -> "StudyFolder":
        """Founds the folder, or resumes it.

        Raises:
            StudyFolderError: the folder holds something else, another configuration's study, cannot be written, another
                run is at work in it, or it is not there for this process, of several, though the first has written it.
        """
        path = Path(config.out)
        file = path / "study.json"
        record = _read_record(file)
        if record is None and not is_first():
            raise StudyFolderError(
                f"{path}: process {process_index()} does not see what the first one wrote there; choose an `out` on a "
                "file system that all processes share"
            )
        if record is None and path.is_dir() and {p.name for p in path.iterdir()} - {LOCK, _draft(file).name}:
            raise StudyFolderError(
                f"{path}: not empty and not a study (no study.json); choose another `out` or an empty folder"
            )
        same = record is not None and record.get("configuration_hash") == config.digest()
        if record is None or (not same and not _is_begun(path, record)):
            # Until a training has begun, a mended configuration may take the folder over.
            record = _new_record(path, config)
        elif not same:
            raise StudyFolderError(
                f"{path}: made by another configuration ({_difference(record['configuration'], config)}); choose "
                "another `out`, or delete the folder to start over"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, record, _lock(path) if is_first() else None)
            folder._write()
        except OSError as error:
            raise StudyFolderError(
                f"{path}: cannot be written ({error.strerror}); free space or choose another `out`"
            ) from error
        return folder

    def seat(self, hospitals: Sequence[str], *, places: int | None) -> tuple[str, ...]:
        """Gives hospitals their places in the study, in the order in which they join, and records them.

        Raises:
            MembershipError: see `membership.seat`.
        """
        roster = members_of(self._record) if _is_begun(self.path, self._record) else ()
        roster = seat(roster, hospitals, places=places, folder=self.path)
        self.record(hospitals=sorted(hospitals), roster=roster)
        return roster

    def keep_weights(self, found: Mapping[str, str]) -> None:
        """Records which files of weights the trainings start from, by SHA-256.

        Raises:
            StudyFolderError: a training has begun, and a file is not the one it began with.
        """
        before = self._record.get("initial_weights", {})
        for file, digest in found.items():
            if _is_begun(self.path, self._record) and before.get(file, digest) != digest:
                raise StudyFolderError(
                    f"{file}: not the weights that {self.path} began with (SHA-256 was {before[file][:16]}…, is "
                    f"{digest[:16]}…); restore the file or choose another `out`"
                )
        self.record(initial_weights={**before, **found})

    def record(self, **facts: Any) -> None:
        """Adds facts about the study for its page."""
        self._record |= facts
        self._write()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage; a resumed study adds to the time its stage took before."""
        watch = Stopwatch()
        yield
        figures = watch.read()
        row = next((r for r in self._record["stages"] if r["name"] == name), None)
        if row is None:
            self._record["stages"].append({"name": name, **figures})
        else:
            for figure in ("seconds", "cpu_seconds"):
                row[figure] = round(row[figure] + figures[figure], 4)
        self._write()

    def finish(self) -> None:
        """Adds up the stages."""
        stages = self._record["stages"]
        for figure in ("seconds", "cpu_seconds"):
            self._record[figure] = round(sum(row[figure] for row in stages), 2)
        self._record["peak_memory_bytes"] = max(row["peak_memory_bytes"] for row in stages)
        self._write()

    def _write(self) -> None:
        if is_first():
            write_json(self.path / "study.json", self._record)


def load_study_config(path: Path) -> StudyConfig:
    """Returns the configuration that a study folder was made by.

    Raises:
        StudyFolderError: no study there, or one of another version of this program.
    """
    record = _read_record(path / "study.json")
    if record is None:
        raise StudyFolderError(f"{path}: no study.json; name the folder that `capsfl train` wrote")
    try:
        return StudyConfig.model_validate_json(json.dumps(record["configuration"]))
    except (KeyError, ValueError) as error:
        raise StudyFolderError(
            f"{path / 'study.json'}: its configuration is not one of this version; train again or install "
            f"capsfl {record.get('versions', {}).get('capsfl', 'of that time')}"
        ) from error


def study_hospitals(path: Path) -> tuple[str, ...]:
    """The hospitals that a study trains on; none before it has split its patients."""
    record = _read_record(path / "study.json") or {}
    return tuple(record.get("hospitals", ()))


def study_kinds(path: Path) -> tuple[str, ...]:
    """What a study has seen of its patients, `volume` or `pictures` or both; a study that does not say, volumes."""
    record = _read_record(path / "study.json") or {}
    return tuple(record.get("kinds", ("volume",)))


def study_weights(path: Path) -> dict[str, str]:
    """SHA-256 of the files of weights that a study's trainings began with, by their paths as configured."""
    record = _read_record(path / "study.json") or {}
    return dict(record.get("initial_weights", {}))


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Names the folder in an error of the disk that names no file, such as a write that ran out of space.

    Raises:
        StudyFolderError: instead of such an error.
    """
    try:
        yield
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise StudyFolderError(
            f"{path}: {error.strerror}; free space or choose another folder, then run the same command again"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside its final place and renames it, so that readers see the old file or the new one.

    The draft's name is always the same, so that one left by a kill is gone when the file is written after all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _draft(path)
    try:
        partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def split_patients(patients: Sequence[Patient], config: DataConfig, *, seed: int) -> Split:
    """Splits patients into train, validation and test, within every hospital and class.

    The manifest's `split` column decides where it is filled in; the rest is drawn from `seed`. All scans of a person go
    together: where splits are filled in, to the strictest of them.

    Raises:
        ValueError: nothing to train on or nothing to test on.
    """
    parts: dict[str, list[Patient]] = {"train": [], "validation": [], "test": []}
    people: dict[tuple[str, str], list[Patient]] = {}
    for patient in sorted(patients, key=lambda patient: (patient.hospital, patient.name)):
        people.setdefault(patient.whose, []).append(patient)
    groups: dict[tuple[str, str], list[list[Patient]]] = {}
    for scans in people.values():
        if fixed := [scan.split for scan in scans if scan.split]:
            parts[min(fixed, key=STRICTEST.index)] += scans
        else:
            groups.setdefault((scans[0].hospital, str(scans[0].label)), []).append(scans)
    generator = np.random.default_rng(seed)
    for _, group in sorted(groups.items()):
        order = generator.permutation(len(group))
        tests = round(config.test_fraction * len(group))
        validations = min(round(config.validation_fraction * len(group)), max(len(group) - tests - 1, 0))
        for place, index in enumerate(order):
            part = "test" if place < tests else "validation" if place < tests + validations else "train"
            parts[part] += group[index]
    for part, remedy in (("train", "hold out fewer"), ("test", "hold out more")):
        if not parts[part]:
            raise ValueError(
                f"data.test_fraction = {config.test_fraction}: no patient left to {part} on among "
                f"{len(patients)} with mask or label; {remedy}, or fill in the manifest's split column"
            )
    return Split(*(tuple(parts[part]) for part in ("train", "validation", "test")))


def _read_record(file: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise StudyFolderError(f"{file}: unreadable ({error}); delete the folder to start over") from error
    if not isinstance(record, dict) or "configuration" not in record:
        raise StudyFolderError(f"{file}: not a study's record; delete the folder to start over")
    return record


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _lock(path: Path) -> int:
    """Takes the folder for this process and returns the descriptor that holds it."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StudyFolderError(
            f"{path}: another `capsfl train` is at work in it; wait for it to end or choose another `out`"
        ) from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _new_record(path: Path, config: StudyConfig) -> dict[str, Any]:
    return {
        "name": path.name,
        "arms": [arm.name for arm in config.arms],
        "primary": config.arms[0].name,
        "configuration": config.model_dump(mode="json"),
        "configuration_hash": config.digest(),
        "versions": {name: version(name) for name in ("capsfl", "jax", "flax", "orbax-checkpoint")},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""),
        "stages": [],
    }


def _is_begun(path: Path, record: dict[str, Any]) -> bool:
    heads = (head for arm in record.get("arms", ()) for head in (path / str(arm)).glob("**/ledger/head"))
    return any(heads)


def _difference(old: dict[str, Any], config: StudyConfig) -> str:
    """Names the first field that differs, with both values."""

    def flatten(value: Any, trail: str = "") -> dict[str, Any]:
        if isinstance(value, dict) and value:
            rows = (flatten(item, f"{trail}.{key}" if trail else key) for key, item in value.items())
        elif isinstance(value, list) and value:
            rows = (flatten(item, f"{trail}.{index}") for index, item in enumerate(value))
        else:
            return {trail: value}
        return {name: item for row in rows for name, item in row.items()}

    before, now = flatten(old), flatten(config.model_dump(mode="json"))
    for name in [*now, *before]:
        if name == "data.residence":
            continue
        if name.split(".")[0] not in ("out", "devices", "jobs", "report") and before.get(name) != now.get(name):
            return f"{name} was {json.dumps(before.get(name))}, is {json.dumps(now.get(name))}"
    return "its fields differ"
