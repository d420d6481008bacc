"""COVIDx-CT (Gunraj et al. 2020, 2022): slices from a dozen sources in three classes."""

import csv
import os
import re
from collections import Counter
from pathlib import Path

from capsfl.ct.collections.classes import class_names, label_of
from capsfl.ct.collections.config import CollectionConfig
from capsfl.ct.collections.entries import Collection, ScanEntry, Split, distinct_names, safe_name
from capsfl.ct.collections.layout import find, listing, read_lines, some, wrong
from capsfl.ct.errors import WrongLayout

CLASSES = ("normal", "pneumonia", "COVID")
WHAT = "COVIDx-CT"
SPLITS: dict[str, Split] = {"train": "train", "val": "validation", "test": "test"}
STRICTEST: tuple[Split, ...] = ("test", "validation", "train")
LIST = re.compile(r"(train|val|test)_COVIDx[_-]CT(?:-(\d[AB]?))?\.txt")
CNCB = re.compile(r"((?:CP|NCP|Normal)_\d+)_\d+_")
SLICE = re.compile(r"(?:_SR_\d+)?[-_](?:IM|IMG)?[-_]?\d+$")
"""Number of the slice, and of the series for the source that writes one."""

Row = tuple[str, int, Split, tuple[int, int, int, int]]


def read_covidx_ct(root: Path, config: CollectionConfig) -> Collection:
    """Read COVIDx-CT, version 1 to 3, variant A or B; three classes, or COVID against the rest.

    Layout: `{train,val,test}_COVIDx_CT-2A.txt` with lines `file class xmin ymin xmax ymax`, the pictures in
    `2A_images/`, and `metadata.csv`, whose `patient id` begins a picture's name and whose `source` becomes the
    hospital. Pictures are cut to the body's box that the lists give. Without `metadata.csv` patients are read off the
    names, and all are of one hospital; a note says so.

    Raises:
        WrongLayout: lists or pictures are absent or malformed.
    """
    lists, variant = _lists(root)
    rows = [row for path, split in lists for row in _rows(path, split)]
    images = find(root, f"{variant}_images", "images", "COVIDx-CT", what=WHAT) if variant else find(
        root, "COVIDx-CT", "images", what=WHAT
    )  # fmt: skip
    there = {entry.name for entry in os.scandir(images)}
    if absent := [name for name, *_ in rows if name not in there]:
        fault = f"{len(rows) - len(absent)} in {images.name} (no {some(absent[:2])})"
        raise wrong(root, WHAT, f"the {len(rows)} pictures that the lists name", fault)
    sources = _sources(root / "metadata.csv")
    notes = [] if sources else ["metadata.csv is absent: patients are read off the names of pictures"]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_patient(row[0], sources), []).append(row)
    names = distinct_names(list(groups))
    entries, mixed, parted = [], Counter(), Counter()
    for patient, slices in groups.items():
        kinds = {row[1] for row in slices}
        splits: set[Split] = {row[2] for row in slices}
        mixed[len(kinds) > 1] += 1
        parted[len(splits) > 1] += 1
        entries.append(
            ScanEntry(
                names[patient],
                safe_name(sources.get(patient, "")) if sources.get(patient) else "covidx-ct",
                images,
                label=label_of(CLASSES[max(kinds)], CLASSES, config),
                split=min(splits, key=STRICTEST.index),
                kind="pictures",
                files=tuple(images / row[0] for row in slices),
                boxes=tuple(row[3] for row in slices),
            )
        )
    if mixed[True]:
        notes.append(f"{mixed[True]} patients have slices of several classes and count as the most severe")
    if parted[True]:
        notes.append(
            f"the official lists part {parted[True]} patients; each went whole to the test set before the validation "
            "set before the training set"
        )
    return Collection(tuple(entries), class_names(CLASSES, config), tuple(notes))


def _lists(root: Path) -> tuple[list[tuple[Path, Split]], str]:
    found = [(path, match) for path in sorted(root.glob("*.txt")) if (match := LIST.fullmatch(path.name))]
    variants = sorted({match[2] or "" for _, match in found})
    words = {match[1] for _, match in found}
    if len(variants) != 1 or words != set(SPLITS):
        expected = "{train,val,test}_COVIDx_CT-2A.txt of one version"
        raise wrong(root, WHAT, expected, some(path.name for path, _ in found) if found else listing(root))
    return [(path, SPLITS[match[1]]) for path, match in found], variants[0]


def _rows(path: Path, split: Split) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(read_lines(path), start=1):
        name, *numbers = line.rsplit(maxsplit=5)
        try:
            kind, *box = map(int, numbers)
            rows.append((name, kind, split, (box[0], box[1], box[2], box[3])))
            valid = 0 <= kind < len(CLASSES)
        except (ValueError, IndexError):
            valid = False
        if not valid:
            raise WrongLayout(path, f"row {number} is not `file class xmin ymin xmax ymax`", "restore the list")
    return rows


def _sources(path: Path) -> dict[str, str]:
    """The source of every patient; empty without the table."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or not {"patient id", "source"} <= rows[0].keys():
        found = some(rows[0]) if rows else "no rows"
        raise WrongLayout(path, f"expected columns `patient id` and `source`, found {found}", "restore it")
    return {row["patient id"]: row["source"] for row in rows}


def _patient(name: str, sources: dict[str, str]) -> str:
    """The longest known patient id that the picture's name begins with; else what the name looks like."""
    stem = name.rpartition(".")[0]
    for end in range(len(stem) - 1, 0, -1):
        if not stem[end].isalnum() and stem[:end] in sources:
            return stem[:end]
    cncb = CNCB.match(name)
    return cncb[1] if cncb else SLICE.sub("", stem) or stem
