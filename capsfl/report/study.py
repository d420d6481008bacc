"""Read a study folder, as training leaves it or while training still writes it, into plain values."""

import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Record = Mapping[str, Any]
"""A JSON object; any key may be absent."""

TASKS = ("segmentation", "classification")


class StudyError(ValueError):
    """A folder or a file that cannot be read as part of a study; one line that names it."""


@dataclass(frozen=True)
class Overlay:
    """One slice for display: `hu` (height, width) in HU, masks of the same shape, rows from top to bottom."""

    patient: str
    hospital: str
    plane: str
    index: str
    dice: float | None
    hu: NDArray[np.float32]
    truth: NDArray[np.bool_] | None
    prediction: NDArray[np.float32] | None
    aspect: float
    """Height of a pixel over its width."""
    decision: float = 0.5
    """Probability above which the prediction marks."""


@dataclass(frozen=True)
class Arm:
    """One training regime of a study: its rounds so far, and its results once it has them."""

    name: str
    folder: Path
    rounds: tuple[Record, ...]
    results: Record
    ledger: Record | None
    chunks: Record
    """By task, how the rounds were compiled, and the memory that was planned for them."""

    def rounds_of(self, task: str) -> list[Record]:
        """Rounds of one task, in the order they were trained."""
        return [row for row in self.rounds if row.get("task") == task]


@dataclass(frozen=True)
class Study:
    """A study: the contents of `study.json` and the arms it names, in its order."""

    folder: Path
    record: Record
    name: str
    primary: str
    arms: tuple[Arm, ...]

    def lead(self, task: str) -> Arm | None:
        """The primary arm if it has results for `task`, else the first arm that has."""
        candidates = sorted(self.arms, key=lambda arm: arm.name != self.primary)
        return next((arm for arm in candidates if record_at(arm.results, task)), None)

    def hospitals(self) -> tuple[str, ...]:
        """The hospitals the study names; where it names none, all that its rounds and results mention, sorted."""
        if named := texts(self.record.get("hospitals")):
            return tuple(named)
        names: set[str] = set()
        for arm in self.arms:
            for row in arm.rounds:
                names.update(record_at(row, "hospitals"))
                names.update(texts(row.get("cohort")))
            for task in TASKS:
                names.update(record_at(arm.results, task, "hospitals"))
        return tuple(sorted(names))


def value_at(record: Any, *keys: str) -> Any:
    """The value under a path of keys, or None where the path breaks off."""
    for key in keys:
        if not isinstance(record, Mapping):
            return None
        record = record.get(key)
    return record


def record_at(record: Any, *keys: str) -> Record:
    """The object under a path of keys, empty where there is none."""
    value = value_at(record, *keys)
    return value if isinstance(value, Mapping) else {}


def rows_at(record: Any, *keys: str) -> list[Record]:
    """The objects of the list under a path of keys, empty where there is none."""
    value = value_at(record, *keys)
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def number_at(record: Any, *keys: str) -> float | None:
    """The finite number under a path of keys, or None."""
    return number(value_at(record, *keys))


def number(value: Any) -> float | None:
    """`value` as a float if it is a finite number (a bool is none), else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= 1e300 and math.isfinite(value) else None


def numbers(values: Any) -> list[float]:
    """A list of finite numbers, or an empty list if any element is not one."""
    if not isinstance(values, list):
        return []
    found = [number(value) for value in values]
    return [value for value in found if value is not None] if None not in found else []


def texts(values: Any) -> list[str]:
    """The strings of a list; empty if `values` is no list."""
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def text(value: Any) -> str:
    """A scalar as text; empty for None and for containers."""
    return "" if value is None or isinstance(value, dict | list) else str(value)


def read_study(folder: Path) -> Study:
    """Read a study folder.

    Args:
        folder: the folder that holds `study.json` and one folder per arm. Files that training has not
            written yet may be absent, and the last line of a `metrics.jsonl` may be torn.

    Raises:
        StudyError: no `study.json`, a damaged file, or an arm whose name leads out of the folder.
    """
    record = _read_object(folder / "study.json")
    if record is None:
        raise StudyError(f"{folder}: no study.json here; give the folder that `capsfl train` wrote")
    names = record.get("arms")
    if not isinstance(names, list) or not names or not all(_is_folder_name(name) for name in names):
        raise StudyError(f"{folder / 'study.json'}: arms is {names!r}; it must list plain folder names")
    arms = tuple(_read_arm(folder, name) for name in dict.fromkeys(names))
    primary = record.get("primary", names[0])
    if primary not in names:
        raise StudyError(f"{folder / 'study.json'}: primary is {primary!r}; it must be one of {names}")
    return Study(
        folder=folder,
        record=record,
        name=text(record.get("name")) or folder.resolve().name,
        primary=primary,
        arms=arms,
    )


def read_overlays(arm: Arm, *, limit: int) -> list[Overlay]:
    """Read at most `limit` overlays of an arm: those that `results.json` lists and `overlays.npz` holds.

    Raises:
        StudyError: `overlays.npz` is damaged or an array in it has an impossible shape.
    """
    path = arm.folder / "overlays.npz"
    listed = rows_at(arm.results, "overlays")
    if not listed or not path.is_file():
        return []
    try:
        # Opened here: numpy leaves a file open that turns out to be no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            present = [row for row in listed if f"hu_{text(row.get('key'))}" in arrays]
            decision = number_at(arm.results, "segmentation", "fusion", "threshold") or 0.5
            return [_overlay(path, row, arrays, decision) for row in present[:limit]]
    except StudyError:
        raise
    except (ValueError, TypeError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise StudyError(f"{path}: cannot be read ({error}); run training again to rewrite it") from error


def _overlay(path: Path, row: Record, arrays: Mapping[str, NDArray[Any]], decision: float) -> Overlay:
    key = text(row.get("key"))
    hu = arrays[f"hu_{key}"]
    layers = {name: arrays.get(f"{name}_{key}") for name in ("truth", "prediction")}
    for name, layer in layers.items():
        if layer is not None and layer.shape != hu.shape:
            raise StudyError(f"{path}: {name}_{key} is {layer.shape}, hu_{key} is {hu.shape}; they must agree")
    if hu.ndim != 2 or min(hu.shape) < 2:
        raise StudyError(f"{path}: hu_{key} has shape {hu.shape}; a slice is (height, width), each >= 2")
    aspect = float(arrays[f"aspect_{key}"]) if f"aspect_{key}" in arrays else 1.0
    if not (math.isfinite(aspect) and 0.01 <= aspect <= 100):
        raise StudyError(f"{path}: aspect_{key} is {aspect}; it must lie between 0.01 and 100")
    truth, prediction = layers["truth"], layers["prediction"]
    return Overlay(
        patient=text(row.get("patient")),
        hospital=text(row.get("hospital")),
        plane=text(row.get("plane")),
        index=text(row.get("index")),
        dice=number(row.get("dice")),
        hu=np.nan_to_num(hu.astype(np.float32), nan=-1000.0),
        truth=None if truth is None else truth.astype(bool),
        prediction=None if prediction is None else np.nan_to_num(prediction.astype(np.float32)),
        aspect=aspect,
        decision=decision,
    )


def _is_folder_name(name: Any) -> bool:
    return isinstance(name, str) and name not in {"", ".", ".."} and not set(name) & set("/\\\0")


def _read_arm(study_folder: Path, name: str) -> Arm:
    folder = study_folder / name
    return Arm(
        name=name,
        folder=folder,
        # Hospitals that train alone each log in a folder of their own.
        rounds=tuple(
            row
            for path in (folder / "metrics.jsonl", *sorted(folder.glob("*/metrics.jsonl")))
            for row in _read_rounds(path)
        ),
        results=_read_object(folder / "results.json") or {},
        ledger=_read_object(folder / "ledger.json"),
        chunks=_read_object(folder / "chunks.json") or {},
    )


def _read_object(path: Path) -> Record | None:
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{path}: not JSON ({error}); restore the file or run training again") from error
    if not isinstance(record, dict):
        raise StudyError(f"{path}: holds a {type(record).__name__}; it must be one JSON object")
    return record


def _read_rounds(path: Path) -> Iterable[Record]:
    """Rows of a metrics log; a round that a resumed run logged again counts once, in its last form."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    rounds: dict[tuple[str, float | None, str], Record] = {}
    for place, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if place == len(lines) - 1:  # torn by a writer still at work: a whole line ends with a newline
                break
            raise StudyError(f"{path} line {place + 1}: not JSON ({error}); delete that line") from error
        if not isinstance(row, dict):
            raise StudyError(f"{path} line {place + 1}: holds a {type(row).__name__}; each line is an object")
        key = (text(row.get("task")), number(row.get("round")), text(row.get("member")))
        rounds.pop(key, None)
        rounds[key] = row
    return rounds.values()
