"""COVID-CT (Yang, He et al. 2020): slices cut out of articles, with the authors' split and patients."""

import csv
from collections import Counter
from pathlib import Path

from capsfl.ct.collections.config import CollectionConfig
from capsfl.ct.collections.entries import Collection, ScanEntry, Split, distinct_names, safe_name
from capsfl.ct.collections.layout import find, read_lines, some, wrong
from capsfl.ct.errors import WrongLayout

CLASSES = ("non-COVID", "COVID")
FOLDERS = ("NonCOVID", "COVID")
SPLITS: dict[str, Split] = {"train": "train", "val": "validation", "test": "test"}
STRICTEST: tuple[Split, ...] = ("test", "validation", "train")
WHAT = "COVID-CT"
TWICE = (("Patient 195", "71%0.jpg"), ("Patient 196", "71%1.jpg"))
"""Slices of an article that the collection holds as COVID in the test list, and cropped as non-COVID in the training
list. A preflight finds them: they are the only pictures of different patients that look alike."""


def read_covid_ct(root: Path, config: CollectionConfig) -> Collection:
    """Read COVID-CT: 349 slices of 213 patients with COVID, 397 of 171 without.

    Layout: `Images/CT_COVID` and `Images/CT_NonCOVID` (or `Images-processed/`, or at the top), the lists
    `Data-split/COVID/trainCT_COVID.txt` and so on, and `Info/COVID-CT-MetaInfo.csv` and
    `Info/NonCOVID-CT-MetaInfo.csv` (or at the top), which say whose a slice is.

    The official lists part no patient. Were one to, all of the patient's slices would go to the test set before
    the validation set before the training set, and a note would count them. Two slices stand in both classes, though,
    and in both the training and the test list; a note says so, and `config.leave_out` takes them out.

    Raises:
        WrongLayout: a folder or a list is absent, a list names a picture that is not there, or a listed picture has
            no patient.
    """
    entries: list[ScanEntry] = []
    notes: list[str] = []
    for label, folder in enumerate(FOLDERS):
        images = find(
            root, f"Images/CT_{folder}", f"Images-processed/CT_{folder}", f"CT_{folder}", what=WHAT
        )  # fmt: skip
        table = f"{folder}-CT-MetaInfo.csv"
        patients = _patients(find(root, f"Info/{table}", table, what=WHAT))
        official = _official(root, folder, images)
        if nobody := [name for name in official if name not in patients]:
            fault = f"{len(nobody)} pictures of CT_{folder} without a patient ({some(nobody[:2])})"
            raise WrongLayout(root, fault, f"restore {table}")
        if left_out := sum(path.is_file() and path.name not in official for path in images.iterdir()):
            notes.append(f"{left_out} pictures of CT_{folder} stand in no list and are left out")
        uses: dict[str, Counter[Split]] = {}
        for name, split in official.items():
            uses.setdefault(patients[name], Counter())[split] += 1
        if parted := [patient for patient, counts in uses.items() if len(counts) > 1]:
            notes.append(
                f"the official lists part {len(parted)} patients of CT_{folder}; each went whole to the test set "
                "before the validation set before the training set"
            )
        names = distinct_names(list(uses))
        for patient, counts in uses.items():
            files = tuple(images / name for name in official if patients[name] == patient)
            split = min(counts, key=STRICTEST.index)
            entries.append(
                ScanEntry(names[patient], "covid-ct", images, label=label, split=split, kind="pictures", files=files)
            )
    notes += _twice(entries)
    return Collection(tuple(entries), CLASSES, tuple(notes))


def _twice(entries: list[ScanEntry]) -> list[str]:
    """What is to be said of slices that stand in both classes."""
    names = {entry.patient for entry in entries}
    files = {file.name: entry.patient for entry in entries for file in entry.files}
    pairs = [(safe_name(patient), files[name]) for patient, name in TWICE if name in files]
    pairs = [pair for pair in pairs if pair[0] in names]
    return [f"{one} (COVID) and {other} (non-COVID) share a slice; leave one out" for one, other in pairs]


def _official(root: Path, folder: str, images: Path) -> dict[str, Split]:
    """The split of every listed picture."""
    official: dict[str, Split] = {}
    for word, split in SPLITS.items():
        path = find(root, f"Data-split/{folder}/{word}CT_{folder}.txt", what=WHAT)
        for name in read_lines(path):
            if official.setdefault(name, split) != split:
                raise WrongLayout(path, f"{name} is in the {official[name]} list too", "restore the official lists")
    if absent := [name for name in official if not (images / name).is_file()]:
        expected = f"the {len(official)} pictures that the lists name in CT_{folder}"
        raise wrong(root, WHAT, expected, f"{len(official) - len(absent)} (no {some(absent[:2])})")
    return official


def _patients(path: Path) -> dict[str, str]:
    """The patient of every picture; the two tables name their columns differently."""
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, csv.Error) as error:
        raise WrongLayout(path, f"cannot be read ({error})", "restore the table") from error
    columns = {str(column).strip().lower(): column for column in (rows[0] if rows else {})}
    picture = columns.get("file name", columns.get("image name"))
    patient = columns.get("patient id")
    if picture is None or patient is None:
        expected = "columns `File name` or `image name`, and `Patient ID`"
        raise WrongLayout(path, f"expected {expected}, found {some(columns)}", "restore the table")
    found = {(row[picture] or "").strip(): (row[patient] or "").strip() for row in rows}
    return {name: whose for name, whose in found.items() if name and whose}
