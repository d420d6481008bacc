"""The manifest of a collection: one CSV row per scan, or per picture."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import cast

from capsfl.ct.collections.entries import NAME, SPLITS, ScanEntry, Split
from capsfl.ct.errors import ManifestError
from capsfl.ct.picture_files import is_picture, picture_files

REQUIRED = ("patient", "hospital", "image")
OPTIONAL = ("scanner", "label", "mask", "mask_threshold", "series", "split", "person")

IMAGES = "a DICOM folder, a .nii or .nii.gz file, or pictures (.png, .jpg)"


def read_manifest(csv_path: Path, root: Path | None = None) -> tuple[ScanEntry, ...]:
    """Read a manifest: patient, hospital, image, and what `OPTIONAL` lists.

    A patient has one row for a scan. Somebody with several scans has a row for each, under patients of different names
    and the same `person`, which tells people apart in all hospitals: nobody is then split, or counted, by scan.
    Pictures are one row each, or one row for a folder that holds nothing else; rows of one patient become one entry and
    have to agree in all but the picture.

    Args:
        csv_path: the CSV file, UTF-8 with a header line.
        root: folder that image and mask are relative to; the CSV's own folder when None.

    Raises:
        ManifestError: names file:line, column, value and remedy of the first fault.
    """
    csv_path = Path(csv_path)
    root = csv_path.parent if root is None else Path(root)
    entries: dict[tuple[str, str], ScanEntry] = {}
    lines: dict[tuple[str, str], int] = {}
    people: dict[str, tuple[int, ScanEntry]] = {}
    for line, cells in read_table(csv_path, required=REQUIRED, optional=OPTIONAL):
        entry = _entry(f"{csv_path}:{line}", cells, root)
        if entry.person:
            _check_person(f"{csv_path}:{line}", entry, *people.setdefault(entry.person, (line, entry)))
        # Compared without case, because some file systems do.
        key = (entry.hospital.lower(), entry.patient.lower())
        if key in entries:
            entry = _merged(f"{csv_path}:{line}", entries[key], entry, first_line=lines[key])
        else:
            lines[key] = line
        entries[key] = entry
    return tuple(entries.values())


def read_table(
    path: Path, *, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> list[tuple[int, dict[str, str]]]:
    """Read a CSV file with a header line: line number and stripped cells by column, blank lines left out.

    Raises:
        ManifestError: unreadable, not CSV, without rows, or with columns that are absent, unknown or double.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            lines = csv.reader(stream, strict=True)
            rows = [(lines.line_num, [cell.strip() for cell in row]) for row in lines]
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror or error}; check the path") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 text; save the manifest as UTF-8 CSV") from error
    except csv.Error as error:
        raise ManifestError(f"{path}: not valid CSV ({error}); check its quotes and commas") from error
    rows = [(line, row) for line, row in rows if any(row)]
    if not rows:
        raise ManifestError(f"{path}: empty; the first line names the columns {', '.join(required)}")
    header = rows[0][1]
    for column in required:
        if column not in header:
            raise ManifestError(f"{path}:1: column {column!r} is absent; it is required")
    for column in header:
        if column not in required + optional:
            known = ", ".join(required + optional)
            raise ManifestError(f"{path}:1: column {column!r} is unknown; the columns are {known}")
        if header.count(column) > 1:
            raise ManifestError(f"{path}:1: column {column!r} appears twice; keep one")
    if len(rows) == 1:
        raise ManifestError(f"{path}: no scans; add one row per scan")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise ManifestError(
                f"{path}:{line}: {len(row)} cells for {len(header)} columns; quote cells that hold commas"
            )
    return [(line, dict(zip(header, row, strict=True))) for line, row in rows[1:]]


def read_name(place: str, column: str, value: str) -> str:
    """A cell that names a patient or a hospital.

    Raises:
        ManifestError: it is no safe name for a folder.
    """
    if not NAME.fullmatch(value):
        raise ManifestError(f"{place}: {column} is {value!r}; use letters, digits, '.', '_' and '-', at most 64")
    return value


def read_label(place: str, value: str) -> int | None:
    """A cell that holds a class.

    Raises:
        ManifestError: it is neither blank nor a small number.
    """
    if value and not (value.isascii() and value.isdigit() and int(value) < 100):
        raise ManifestError(f"{place}: label is {value!r}; use 0, 1 (2 and up for further classes) or leave it blank")
    return int(value) if value else None


def read_split(place: str, value: str) -> Split | None:
    """A cell that holds a patient's use.

    Raises:
        ManifestError: it is neither blank nor one of the three.
    """
    if value and value not in SPLITS:
        raise ManifestError(f"{place}: split is {value!r}; use {', '.join(SPLITS)} or leave it blank")
    return cast(Split, value) if value else None


def is_nifti(path: Path) -> bool:
    """Whether a file is named like NIfTI."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _entry(place: str, cells: dict[str, str], root: Path) -> ScanEntry:
    for column in ("patient", "hospital"):
        read_name(place, column, cells[column])
    if cells.get("person"):
        read_name(place, "person", cells["person"])
    image = _existing(place, "image", cells["image"], root)
    if image is None:
        raise ManifestError(f"{place}: image is blank; give {IMAGES}")
    pictures: tuple[Path, ...] = ()
    if image.is_dir():
        pictures = picture_files(image)
    elif is_picture(image):
        image, pictures = image.parent, (image,)
    elif not is_nifti(image):
        raise ManifestError(f"{place}: image is {cells['image']!r}; give {IMAGES}")
    mask = _existing(place, "mask", cells.get("mask", ""), root)
    if mask is not None and not (mask.is_file() and is_nifti(mask)):
        raise ManifestError(f"{place}: mask is {cells['mask']!r}; give a .nii or .nii.gz file")
    if mask is not None and pictures:
        raise ManifestError(f"{place}: mask is {cells['mask']!r}; pictures have none, leave it blank")
    return ScanEntry(
        patient=cells["patient"],
        hospital=cells["hospital"],
        image=image,
        scanner=cells.get("scanner") or None,
        label=read_label(place, cells.get("label", "")),
        mask=mask,
        mask_threshold=_threshold(place, cells.get("mask_threshold", "")),
        series=cells.get("series") or None,
        split=read_split(place, cells.get("split", "")),
        kind="pictures" if pictures else "volume",
        files=pictures,
        person=cells.get("person") or None,
    )


def _merged(place: str, first: ScanEntry, other: ScanEntry, *, first_line: int) -> ScanEntry:
    """Two rows of one patient, if both are pictures of the same class and use."""
    who = f"patient {other.patient!r} of hospital {other.hospital!r} stands in line {first_line} already"
    if "volume" in (first.kind, other.kind):
        raise ManifestError(f"{place}: {who}; keep one scan per patient")
    for column in ("patient", "hospital", "scanner", "label", "split", "person"):
        if (before := getattr(first, column)) != (now := getattr(other, column)):
            raise ManifestError(f"{place}: {who} with {column} {before!r}, not {now!r}; give all its pictures the same")
    folder = first.image
    while not other.image.is_relative_to(folder):
        folder = folder.parent
    return replace(first, image=folder, files=tuple(sorted({*first.files, *other.files})))


def _check_person(place: str, entry: ScanEntry, first_line: int, first: ScanEntry) -> None:
    """See that a person's scans are all of one hospital and one split."""
    for column in ("hospital", "split"):
        if (before := getattr(first, column)) != (now := getattr(entry, column)):
            raise ManifestError(
                f"{place}: person {entry.person!r} stands in line {first_line} with {column} {before!r}, not {now!r}; "
                f"give all scans of a person one {column}"
            )


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
