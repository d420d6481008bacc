"""The manifest of a collection: one CSV row per scan."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from capsfl.ct.errors import ManifestError

Split = Literal["train", "validation", "test"]
SPLITS = ("train", "validation", "test")
REQUIRED = ("patient", "hospital", "image")
OPTIONAL = ("scanner", "label", "mask", "mask_threshold", "series", "split")

# Patients and hospitals become folder names and printed labels, so they are kept to what is safe for both.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class ScanEntry:
    """One scan of a collection."""

    patient: str
    """Pseudonym, unique within its hospital."""
    hospital: str
    image: Path
    """A folder of one DICOM series, or a .nii or .nii.gz file."""
    scanner: str | None = None
    label: int | None = None
    """1 is positive, 0 negative, None unknown."""
    mask: Path | None = None
    """NIfTI mask on the image's grid."""
    mask_threshold: float = 0.5
    """Stored values from here on are inside the mask."""
    series: str | None = None
    """Which DICOM series of the folder, if it holds several."""
    split: Split | None = None


def read_manifest(csv_path: Path, root: Path | None = None) -> tuple[ScanEntry, ...]:
    """Read a manifest: patient, hospital, image, and optionally scanner, label, mask, mask_threshold,
    series, split.

    Args:
        csv_path: the CSV file, UTF-8 with a header line.
        root: folder that image and mask are relative to; the CSV's own folder when None.

    Raises:
        ManifestError: names file:line, column, value and remedy of the first fault.
    """
    csv_path = Path(csv_path)
    root = csv_path.parent if root is None else Path(root)
    try:
        with csv_path.open(newline="", encoding="utf-8-sig") as stream:
            lines = csv.reader(stream, strict=True)
            rows = [(lines.line_num, [cell.strip() for cell in row]) for row in lines]
    except OSError as error:
        raise ManifestError(f"{csv_path}: {error.strerror or error}; check the path") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{csv_path}: not UTF-8 text; save the manifest as UTF-8 CSV") from error
    except csv.Error as error:
        raise ManifestError(f"{csv_path}: not valid CSV ({error}); check its quotes and commas") from error
    rows = [(line, row) for line, row in rows if any(row)]
    if not rows:
        raise ManifestError(f"{csv_path}: empty; the first line names the columns {', '.join(REQUIRED)}")
    header = rows[0][1]
    _check_header(csv_path, header)
    if len(rows) == 1:
        raise ManifestError(f"{csv_path}: no scans; add one row per scan")
    entries: list[ScanEntry] = []
    seen: dict[tuple[str, str], int] = {}
    for line, row in rows[1:]:
        place = f"{csv_path}:{line}"
        if len(row) != len(header):
            raise ManifestError(f"{place}: {len(row)} cells for {len(header)} columns; quote cells that hold commas")
        entry = _entry(place, dict(zip(header, row, strict=True)), root)
        # Compared without case, because some file systems do.
        key = (entry.hospital.lower(), entry.patient.lower())
        if key in seen:
            raise ManifestError(
                f"{place}: patient {entry.patient!r} of hospital {entry.hospital!r} stands in line "
                f"{seen[key]} already; keep one scan per patient"
            )
        seen[key] = line
        entries.append(entry)
    return tuple(entries)


def _check_header(path: Path, header: list[str]) -> None:
    for column in REQUIRED:
        if column not in header:
            raise ManifestError(f"{path}:1: column {column!r} is absent; it is required")
    for column in header:
        if column not in REQUIRED + OPTIONAL:
            known = ", ".join(REQUIRED + OPTIONAL)
            raise ManifestError(f"{path}:1: column {column!r} is unknown; the columns are {known}")
        if header.count(column) > 1:
            raise ManifestError(f"{path}:1: column {column!r} appears twice; keep one")


def _entry(place: str, cells: dict[str, str], root: Path) -> ScanEntry:
    for column in ("patient", "hospital"):
        if not NAME.fullmatch(cells[column]):
            raise ManifestError(
                f"{place}: {column} is {cells[column]!r}; use letters, digits, '.', '_' and '-', at most 64"
            )
    image = _existing(place, "image", cells["image"], root)
    if image is None:
        raise ManifestError(f"{place}: image is blank; give a DICOM folder or a .nii.gz file")
    if image.is_file() and not is_nifti(image):
        raise ManifestError(f"{place}: image is {cells['image']!r}; give a DICOM folder or a .nii or .nii.gz file")
    mask = _existing(place, "mask", cells.get("mask", ""), root)
    if mask is not None and not (mask.is_file() and is_nifti(mask)):
        raise ManifestError(f"{place}: mask is {cells['mask']!r}; give a .nii or .nii.gz file")
    label = cells.get("label", "")
    if label not in ("", "0", "1"):
        raise ManifestError(f"{place}: label is {label!r}; use 0, 1 or leave it blank")
    split = cells.get("split", "")
    if split and split not in SPLITS:
        raise ManifestError(f"{place}: split is {split!r}; use {', '.join(SPLITS)} or leave it blank")
    return ScanEntry(
        patient=cells["patient"],
        hospital=cells["hospital"],
        image=image,
        scanner=cells.get("scanner") or None,
        label=int(label) if label else None,
        mask=mask,
        mask_threshold=_threshold(place, cells.get("mask_threshold", "")),
        series=cells.get("series") or None,
        split=cast(Split, split) if split else None,
    )


def is_nifti(path: Path) -> bool:
    """Whether a file is named like NIfTI."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _existing(place: str, column: str, value: str, root: Path) -> Path | None:
    if not value:
        return None
    path = root / value
    if not path.exists():
        raise ManifestError(f"{place}: {column} is {value!r}; no such file or folder under {root}")
    return path


def _threshold(place: str, value: str) -> float:
    if not value:
        return 0.5
    try:
        threshold = float(value)
    except ValueError:
        threshold = float("nan")
    if not abs(threshold) < float("inf"):
        raise ManifestError(f"{place}: mask_threshold is {value!r}; use a finite number such as 0.5")
    return threshold
