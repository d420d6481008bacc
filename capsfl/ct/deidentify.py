"""What may be said of a header: technical values, as long as nothing of the patient has slipped into them."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from capsfl.ct.headers import quiet_pydicom

WITHHELD = "withheld"
PATIENT_GROUP = 0x0010
NAMING = {
    *("AccessionNumber", "InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName"),
    *("StudyID", "DeviceSerialNumber", "RequestingService", "OtherPatientIDs", "StudyDate", "SeriesDate"),
}
IDS = {"PatientID", "OtherPatientIDs"}
SHORTEST_WORD = 3
SHORTEST_OF_NAME = 2
"""Of a person's name; signs that are no Latin letters may be a name each."""
SHORTEST_NUMBER = 5
"""Shorter numbers are a scanner's rows or a kernel's strength as often as they are somebody's."""
SHORTEST_ID = 4
"""A patient's whole id counts from here on; a shorter number, such as 64, only where it is all of a value."""


def identifying_words(path: Path) -> frozenset[str]:
    """Words of a file's identifying values: all of the patient's group, all names of persons, places and visits.

    Sequences are searched to any depth. The words are compared with what is to be shown, and never kept. Empty for a
    file that is no DICOM.
    """
    with quiet_pydicom():
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        except Exception:  # damaged, or not DICOM: nothing of it is shown
            return frozenset()
        return frozenset(word for element in _elements(header) for word in _identifying(element))


def shown(text: str, words: Iterable[str]) -> str:
    """The text, unless an identifying word stands in it, or a patient's whole id."""
    words = set(words)
    parts = _parts(text)
    line = f" {' '.join(parts)} "
    phrases = (word for word in words if " " in word)
    found = line.strip() in words or any(f" {phrase} " in line for phrase in phrases)
    found = found or bool(words & {part for part in parts if not part.isdigit() or len(part) >= SHORTEST_ID})
    return WITHHELD if found else text


def _elements(header: Dataset) -> Iterator[DataElement]:
    """The elements of a data set and of all its sequences; one that is damaged is passed by."""
    for tag in list(header.keys()):
        try:
            element = header[tag]
            items = list(element.value or ()) if element.VR == "SQ" else []
        except Exception:  # pydicom raises anything for a damaged value, and nobody will be shown it either
            continue
        if element.VR != "SQ":
            yield element
        for item in items:
            yield from _elements(item)


def _identifying(element: DataElement) -> list[str]:
    """The words of an element that may identify somebody; none of another element."""
    is_name = element.VR == "PN"
    if not (is_name or element.tag.group == PATIENT_GROUP or element.keyword in NAMING):
        return []
    parts = _parts(str(element.value))
    words = [part for part in parts if len(part) >= (SHORTEST_NUMBER if part.isdigit() else SHORTEST_WORD)]
    if is_name:
        words += [p for p in parts if not p.isdigit() and (len(p) >= SHORTEST_OF_NAME or not p.isascii())]
    if element.keyword in IDS and parts:
        words.append(" ".join(parts))
    return words


def _parts(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
