"""CC-19 (Kumar et al. 2020): 89 patients of three hospitals, as DICOM series or as the repository's 2-D slices."""

import csv
from pathlib import Path

from capsfl.ct.collections.classes import order_classes
from capsfl.ct.collections.config import CollectionConfig
from capsfl.ct.collections.dicom_folder import read_dicom_folder
from capsfl.ct.collections.entries import Split
from capsfl.ct.collections.image_folder import group_pictures
from capsfl.ct.collections.layout import some, wrong
from capsfl.ct.collections.table import Found
from capsfl.ct.errors import WrongLayout
from capsfl.ct.reader import ReaderConfig

WHAT = "CC-19"
LIST = "data_file.csv"
SPLITS: dict[str, Split] = {"train": "train", "test": "test"}


def read_cc19(
    root: Path, config: CollectionConfig, reader: ReaderConfig | None = None, *, all_series: bool = False
) -> tuple[tuple[Found, ...], tuple[str, ...], list[str]]:
    """Read CC-19; returns entries, classes and notes.

    With `data_file.csv` at the top it is the 2-D form: a line is split, class, stem and number of slices, and the
    slices are `data/<split>/<class>/<stem>*jpg`. Otherwise it is a tree of DICOM files, whose folders nobody
    documented: see `read_dicom_folder`. Labels, hospitals and scanners that neither folders nor tags tell come from
    `config.table`.

    Raises:
        WrongLayout: the list is malformed, names slices that are not there, or there is neither a list nor a series.
    """
    if not (root / LIST).is_file():
        return read_dicom_folder(root, config, reader, all_series=all_series)
    whose: dict[Path, tuple[Split | None, str, str]] = {}
    notes: list[str] = []
    stems = _stems(root / LIST)
    short = 0
    for (split, kind), counts in stems.items():
        folder = next((place for place in (root / "data", root) if (place / split / kind).is_dir()), None)
        if folder is None:
            raise wrong(root, WHAT, f"data/{split}/{kind}, which {LIST} names")
        files: dict[str, list[Path]] = {stem: [] for stem in counts}
        for path in sorted((folder / split / kind).iterdir()):
            # `p1` begins the slices of `p10` too, whether the list names `p10` or not; the longest stem has them.
            stem = max((stem for stem in counts if _begins(path.name, stem)), key=len, default=None)
            if stem is not None and path.suffix.lower() in (".jpg", ".jpeg"):
                files[stem].append(path)
        if empty := [stem for stem, found in files.items() if not found]:
            raise wrong(root, WHAT, f"slices of every stem in {LIST}", f"none of {some(empty)} in {split}/{kind}")
        short += sum(len(found) != counts[stem] for stem, found in files.items())
        whose |= {path: (SPLITS[split], kind, stem) for stem, found in files.items() for path in found}
    if short:
        notes.append(f"{short} patients have another number of slices than {LIST} says")
    classes = order_classes({kind for _, kind, _ in whose.values()}, config)
    found, names, parted = group_pictures(root, whose, classes, config, hospital="cc-19")
    return found, names, notes + parted


def _begins(name: str, stem: str) -> bool:
    """Whether a file's name is the stem and something after it that is no further digit of the stem's number."""
    return name.startswith(stem) and not (stem[-1:].isdigit() and name[len(stem) :][:1].isdigit())


def _stems(path: Path) -> dict[tuple[str, str], dict[str, int]]:
    """The number of slices of every stem, by split and class."""
    stems: dict[tuple[str, str], dict[str, int]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
            for number, row in enumerate(csv.reader(stream), start=1):
                if not any(row):
                    continue
                if len(row) != 4 or row[0] not in SPLITS or not row[3].strip().isdigit():
                    raise WrongLayout(path, f"line {number} is not `train|test,class,stem,slices`", "restore the list")
                stems.setdefault((row[0], row[1]), {})[row[2]] = int(row[3])
    except (OSError, csv.Error) as error:
        raise WrongLayout(path, f"cannot be read ({error})", "restore the list") from error
    if not stems:
        raise WrongLayout(path, "empty", "restore the list")
    return stems
