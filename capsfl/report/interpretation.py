"""What the capsules of a few test patients show: read from a run's folder, made ready for the page."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from capsfl.report.capsules import Grid, Layer, Slice, draw_couplings, draw_grid, palette_css
from capsfl.report.study import Arm, Record, Study, StudyError, number_at, numbers, record_at, rows_at, text

FILE = "interpretation.npz"

Arrays = Mapping[str, NDArray[Any]]
Prepare = Callable[[Path, Record, Arrays, Arm], dict[str, Any] | None]


def interpretation(study: Study) -> dict[str, Any] | None:
    """Everything of the page's section; None where no run has written anything for it.

    Raises:
        StudyError: the file of arrays is damaged, or an array in it has an impossible shape.
    """
    found = {
        "capsules": _section(study, "classification", "capsules", _grid),
        "couplings": _section(study, "segmentation", "couplings", _slice),
    }
    if not any(found.values()):
        return None
    return found | {"scale": Markup(palette_css("magma")), "shares": Markup(palette_css("PuOr_r"))}


def _section(study: Study, task: str, part: str, prepare: Prepare) -> dict[str, Any] | None:
    arm = study.lead(task)
    record = record_at(arm.results, "interpretation", part) if arm else {}
    if arm is None or not record:
        return None
    facts = {
        "arm": arm.name,
        "network": text(record.get("network")),
        "absent": text(record.get("absent")),
        "iterations": text(record.get("iterations")),
    }
    listed = rows_at(record, "patients")
    path = arm.folder / FILE
    if not listed or not path.is_file():
        return facts | {"patients": []}
    try:
        # Opened here: numpy leaves a file open that turns out to be no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return facts | {"patients": [row for each in listed if (row := prepare(path, each, arrays, arm))]}
    except StudyError:
        raise
    except (ValueError, TypeError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise StudyError(f"{path}: cannot be read ({error}); run training again to rewrite it") from error


def _grid(path: Path, row: Record, arrays: Arrays, arm: Arm) -> dict[str, Any] | None:
    key = text(row.get("key"))
    if f"moved_{key}" not in arrays:
        return None
    grid = Grid(arrays[f"image_{key}"], arrays[f"moved_{key}"], arrays["tweaks"], arrays[f"capsule_{key}"])
    dim, steps = grid.moved.shape[:2]
    expected = {
        "image": (grid.image, grid.moved.shape[2:], np.uint8),
        "moved": (grid.moved, (dim, steps, *grid.image.shape), np.uint8),
        "capsule": (grid.capsule, (dim,), grid.capsule.dtype),
    }
    for name, (array, shape, dtype) in expected.items():
        if array.shape != shape or array.dtype != dtype or not array.size:
            raise StudyError(f"{path}: {name}_{key} is {array.dtype} {array.shape}; expected {np.dtype(dtype)} {shape}")
    if grid.tweaks.shape != (steps,):
        raise StudyError(f"{path}: tweaks is {grid.tweaks.shape}; expected {(steps,)}, as in moved_{key}")
    lengths, chosen = numbers(row.get("lengths")), number_at(row, "class")
    length = lengths[int(chosen)] if chosen is not None and 0 <= chosen < len(lengths) else None
    return {**row, "drawing": Markup(draw_grid(grid, label=_name(row))), "length": length, "dim": dim}


def _slice(path: Path, row: Record, arrays: Arrays, arm: Arm) -> dict[str, Any] | None:
    key = text(row.get("key"))
    layers = [_layer(path, key, each, arrays) for each in rows_at(row, "layers")]
    if not layers or f"hu_{key}" not in arrays:
        return None
    hu, body, truth, prediction = (arrays[f"{name}_{key}"] for name in ("hu", "body", "truth", "prediction"))
    aspect = float(arrays[f"aspect_{key}"])
    if hu.ndim != 2 or not hu.size or not body.shape == truth.shape == prediction.shape == hu.shape:
        shapes = ", ".join(str(array.shape) for array in (hu, body, truth, prediction))
        raise StudyError(f"{path}: hu, body, truth, prediction of {key} are {shapes}; expected one shape of two sides")
    if not 0.01 <= aspect <= 100:
        raise StudyError(f"{path}: aspect_{key} is {aspect}; it must lie between 0.01 and 100")
    for layer in layers:
        if hu.shape[0] % layer.lengths.shape[1] or hu.shape[1] % layer.lengths.shape[2]:
            raise StudyError(f"{path}: {layer.name} of {key} is {layer.lengths.shape}; no part of a slice {hu.shape}")
    decision = number_at(arm.results, "segmentation", "fusion", "threshold") or 0.5
    found = Slice(
        np.nan_to_num(hu.astype(np.float32), nan=-1000.0),
        body.astype(bool),
        truth.astype(bool),
        np.nan_to_num(prediction.astype(np.float32)),
        aspect,
        decision,
        tuple(layers),
    )
    return {**row, "drawing": Markup(draw_couplings(found, label=_name(row))), "peak": found.peak()}


def _layer(path: Path, key: str, row: Record, arrays: Arrays) -> Layer:
    name = text(row.get("name"))
    sources = tuple(int(size) for size in numbers(row.get("sources")))
    couplings, lengths = (arrays[f"{what}_{key}_{name}"].astype(np.float32) for what in ("couplings", "lengths"))
    if couplings.ndim != 4 or couplings.shape[1:] != lengths.shape or not couplings.size or couplings.shape[1] < 2:
        raise StudyError(f"{path}: couplings and lengths of {name} are {couplings.shape} and {lengths.shape}")
    if sum(sources) != len(couplings):
        raise StudyError(f"{path}: {name} has {len(couplings)} child types; results.json says {list(sources)}")
    return Layer(name, sources, np.nan_to_num(couplings), np.nan_to_num(lengths))


def _name(row: Record) -> str:
    return f"{text(row.get('patient'))}, hospital {text(row.get('hospital'))}"
