"""SARS-CoV-2 CT (Soares et al. 2020): 2,482 slices of 120 patients, without saying whose."""

from dataclasses import replace
from pathlib import Path

from capsfl.ct.collections.config import CollectionConfig
from capsfl.ct.collections.entries import Split
from capsfl.ct.collections.image_folder import group_pictures
from capsfl.ct.collections.layout import find, wrong
from capsfl.ct.collections.manifest import read_table
from capsfl.ct.collections.table import Found
from capsfl.ct.errors import ManifestError
from capsfl.ct.picture_files import is_picture

WHAT = "SARS-CoV-2 CT"
CLASSES = ("non-COVID", "COVID")


def read_sars_cov2_ct(root: Path, config: CollectionConfig) -> tuple[tuple[Found, ...], tuple[str, ...], list[str]]:
    """Read SARS-CoV-2 CT: `COVID/*.png` and `non-COVID/*.png`; returns entries, classes and notes.

    The collection does not say which patient a slice belongs to, so no split of it is by patient, and published
    accuracies from random splits of the slices compare a patient with himself. Without a table every slice stands for
    itself and is for testing only, whatever `split` says: a model trained elsewhere may be tried on it. A
    `config.pictures` table with columns picture (`COVID/Covid (1).png`) and patient lifts that.

    Raises:
        WrongLayout: a class folder is absent or without pictures.
        ManifestError: the table names a picture that is not there, or leaves one out.
    """
    whose: dict[Path, tuple[Split | None, str, str]] = {}
    for kind in CLASSES:
        folder = find(root, kind, what=WHAT)
        pictures = [path for path in sorted(folder.iterdir()) if is_picture(path)]
        if not pictures:
            raise wrong(folder, f"a class of {WHAT}", "*.png")
        whose |= {path: ("test", kind, path.stem) for path in pictures}
    if not config.pictures:
        found, classes, _ = group_pictures(root, whose, CLASSES, config, hospital="sars-cov-2-ct")
        note = "the collection names no patients: every slice stands for itself, and all are for testing only"
        return found, classes, [note]
    patients = _patients(root, config.pictures, whose)
    whose = {path: (None, kind, patients[path]) for path, (_, kind, _) in whose.items()}
    found, classes, notes = group_pictures(root, whose, CLASSES, config, hospital="sars-cov-2-ct")
    return tuple(replace(item, entry=replace(item.entry, split=None)) for item in found), classes, notes


def _patients(root: Path, table: str, pictures: dict[Path, tuple[Split | None, str, str]]) -> dict[Path, str]:
    path = root / table
    patients: dict[Path, str] = {}
    for line, cells in read_table(path, required=("picture", "patient")):
        picture = root / cells["picture"]
        if picture not in pictures or not cells["patient"]:
            raise ManifestError(f"{path}:{line}: no picture {cells['picture']!r} with a patient; mend the row")
        patients[picture] = cells["patient"]
    if missing := len(pictures) - len(patients):
        raise ManifestError(f"{path}: {missing} of {len(pictures)} pictures have no row; add them")
    return patients
