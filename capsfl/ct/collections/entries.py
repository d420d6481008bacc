"""What every importer yields: one entry per scan, and the collection's classes and notes."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS = ("train", "validation", "test")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Patients and hospitals become folder names and printed labels, so they are kept to what is safe for both."""


@dataclass(frozen=True)
class ScanEntry:
    """One scan of a collection, or the pictures of one patient."""

    patient: str
    """Pseudonym, unique within its hospital."""
    hospital: str
    image: Path
    """A folder of one DICOM series, a .nii or .nii.gz file, or for pictures the folder that holds them."""
    scanner: str | None = None
    label: int | None = None
    """Class of the patient, 0 for none of the disease; None unknown."""
    mask: Path | None = None
    """NIfTI mask on the image's grid."""
    mask_threshold: float = 0.5
    """Stored values from here on are inside the mask."""
    series: str | None = None
    """Which DICOM series of the folder, if it holds several."""
    split: Split | None = None
    kind: Literal["volume", "pictures"] = "volume"
    """A volume in Hounsfield units, or grey pictures (PNG, JPEG) that are none."""
    files: tuple[Path, ...] = ()
    """The pictures; or the files of the series, where its folder is not to be searched. Below `image`."""
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    """For each picture the part of it that counts, (left, top, right, bottom) in pixels; empty for all of it."""
    person: str | None = None
    """Pseudonym of the person, one in all hospitals, where somebody may have several scans; None where `patient` says
    who it is."""

    @property
    def whose(self) -> tuple[str, str]:
        """What tells people apart: entries that share it go into one hospital and one split."""
        return whose(self.hospital, self.patient, self.person)


@dataclass(frozen=True)
class Collection:
    """A collection as its importer found it."""

    entries: tuple[ScanEntry, ...]
    classes: tuple[str, ...] = ("negative", "positive")
    """What the labels 0, 1, ... mean."""
    notes: tuple[str, ...] = ()
    """What a reader of results has to know: what was left out, moved or drawn. No identifying value."""
    test_only: bool = False
    """Nobody says whose a picture is, so none may be trained on beside another that is tested."""


def whose(hospital: str, patient: str, person: str | None) -> tuple[str, str]:
    """What tells people apart: the person, else the hospital and the patient's name there."""
    return ("", person) if person else (hospital, patient)


def safe_name(text: str) -> str:
    """Turn a public identifier into a name for folders: other characters become `-`.

    Two identifiers may give one name; `distinct_names` keeps them apart.
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:56] or "unnamed"


def distinct_names(identifiers: list[str]) -> dict[str, str]:
    """Give every identifier a safe name of its own, the same for the same list; case does not tell names apart."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for identifier in dict.fromkeys(identifiers):
        stem = name = safe_name(identifier)
        number = 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}"
        names[identifier] = name
        taken.add(name.lower())
    return names


def numbered(identifiers: list[str], stem: str) -> dict[str, str]:
    """Give every identifier a number that says nothing about it but its place in their order: `patient-0012`.

    For folders whose names may be a patient's. The same folder gives the same numbers, so that a study's splits
    and hospitals can be repeated.
    """
    ordered = sorted(set(identifiers))
    digits = max(4, len(str(len(ordered))))
    return {identifier: f"{stem}-{place:0{digits}d}" for place, identifier in enumerate(ordered, start=1)}
