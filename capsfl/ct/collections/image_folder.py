"""Pictures in folders by class: `<class>/<patient>...`, with train, validation and test above where they are split."""

import re
from collections import Counter
from pathlib import Path

from capsfl.ct.collections.classes import class_names, label_of, order_classes
from capsfl.ct.collections.config import CollectionConfig
from capsfl.ct.collections.entries import ScanEntry, Split, numbered
from capsfl.ct.collections.layout import files_below, some, wrong
from capsfl.ct.collections.table import Found
from capsfl.ct.errors import WrongLayout
from capsfl.ct.picture_files import is_picture

SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
STRICTEST: tuple[Split | None, ...] = ("test", "validation", "train", None)
SLICE = re.compile(r"(?:[-_ .%]+(?:slice|img|image|im|frame)?[-_ .]*\d+|[-_ ]*\(\d+\))$", re.IGNORECASE)
"""The end of a file name that counts slices: `p7_012`, `p7%3`, `p7-IM00012`, `p7 (12)`; never `p7` itself."""


def read_image_folder(root: Path, config: CollectionConfig) -> tuple[tuple[Found, ...], tuple[str, ...], list[str]]:
    """Read pictures by class; returns entries, classes and notes.

    A patient is a folder inside the class's folder, or what remains of a file's name without the number of its slice,
    or the first group of `config.patient_pattern` in the path below the class. Patients get numbers for names.

    Raises:
        WrongLayout: no folder of pictures, a picture that `patient_pattern` does not match, or one class alone.
    """
    pictures = [path for path in sorted(files_below(root)) if is_picture(path)] if root.is_dir() else []
    if not pictures:
        raise wrong(root, "a folder of pictures", "<class>/<patient>/*.png or <class>/<patient>_<slice>.png")
    whose: dict[Path, tuple[Split | None, str, str]] = {}
    for path in pictures:
        parts = list(path.relative_to(root).parts)
        split = SPLIT_FOLDERS.get(parts[0].lower()) if len(parts) > 2 else None
        parts = parts[1:] if split else parts
        kind, *below = parts
        if not below:
            raise wrong(root, "a folder of pictures", "a folder for every class", f"{path.name} outside of any")
        whose[path] = split, kind, _patient(root, below, config.patient_pattern)
    classes = order_classes({kind for _, kind, _ in whose.values()}, config)
    if len(classes) < 2:
        raise wrong(root, "a folder of pictures", "two or more class folders", f"{some(classes)} alone")
    return group_pictures(root, whose, classes, config)


def group_pictures(
    root: Path,
    whose: dict[Path, tuple[Split | None, str, str]],
    classes: tuple[str, ...],
    config: CollectionConfig,
    *,
    hospital: str = "local",
) -> tuple[tuple[Found, ...], tuple[str, ...], list[str]]:
    """Make one entry a patient from what is known about every picture: split, class, patient.

    A patient is told apart by class too: two classes number their patients each from one. One whom the folders part
    goes whole to the test set before the validation set before the training set.
    """
    groups: dict[tuple[str, str], list[Path]] = {}
    for path, (_, kind, patient) in whose.items():
        groups.setdefault((kind, patient), []).append(path)
    names = numbered([f"{kind}\n{patient}" for kind, patient in groups], "patient")
    found, parted = [], Counter()
    for (kind, patient), files in groups.items():
        splits: set[Split | None] = {whose[path][0] for path in files}
        parted[len(splits) > 1] += 1
        entry = ScanEntry(
            names[f"{kind}\n{patient}"],
            hospital,
            root,
            label=label_of(kind, classes, config),
            split=min(splits, key=STRICTEST.index),
            kind="pictures",
            files=tuple(files),
        )
        found.append(Found(entry, patient, folder=files[0].parent.relative_to(root).as_posix()))
    notes = []
    if parted[True]:
        notes.append(
            f"the folders part {parted[True]} patients; each went whole to the test set before the validation set "
            "before the training set"
        )
    return tuple(found), class_names(classes, config), notes


def _patient(root: Path, parts: list[str], pattern: str) -> str:
    if pattern:
        path = "/".join(parts)
        match = re.search(pattern, path)
        if match is None or not (match[1] if match.re.groups else match[0]):
            fault = f"collection.patient_pattern = {pattern!r} does not match {path}"
            raise WrongLayout(root, fault, "mend the pattern")
        return match[1] if match.re.groups else match[0]
    if len(parts) > 1:
        return parts[0]
    stem = Path(parts[0]).stem
    return SLICE.sub("", stem) or stem
