"""A tree of DICOM files without a manifest: every series a scan, patients and sites under numbers."""

from collections import Counter
from pathlib import Path

import pydicom

from capsfl.ct.collections.classes import disease_in_path
from capsfl.ct.collections.config import CollectionConfig
from capsfl.ct.collections.entries import ScanEntry, numbered
from capsfl.ct.collections.layout import wrong
from capsfl.ct.collections.table import Found
from capsfl.ct.errors import TooFewSlices
from capsfl.ct.headers import quiet_pydicom
from capsfl.ct.reader import ReaderConfig
from capsfl.ct.series import Series, scan_folder

CLASSES = ("non-COVID", "COVID")


def read_dicom_folder(
    root: Path, config: CollectionConfig, reader: ReaderConfig | None = None, *, all_series: bool = False
) -> tuple[tuple[Found, ...], tuple[str, ...], list[str]]:
    """Read any tree of DICOM files; returns entries, classes and notes.

    A series is what shares a SeriesInstanceUID, or a folder where files have none. A patient is what shares a
    PatientID, in all hospitals; where a file has none, or one that stands for nobody, a study is a patient. With
    `series = "largest"` the patient's largest usable series stands for him. Patients and hospitals get numbers for
    names, in the order of their identifiers, which are not kept; a hospital is an InstitutionName. A folder called
    covid, positive, normal or the like anywhere above a series is its label; `config.table` overrides all.

    Series too small for a volume are left out and counted. One that is refused for another reason stays an entry, so
    that ingestion names it. With `all_series` nothing is left out, for a table of what there is. A series has the same
    name whatever is left out.

    Raises:
        WrongLayout: no CT series in the tree.
        NoSeries: no such folder, or it is empty.
    """
    listing = scan_folder(root, config=reader, progress=True)
    series = [part for one in listing.series for part in ([one] if one.uid else _by_folder(one, reader))]
    small = 0 if all_series else sum(not _is_large(one) for one in series)
    if small == len(series):
        raise wrong(root, "a tree of CT series", "DICOM series of 4 slices or more", listing.found())
    notes = []
    if small:
        notes.append(f"{small} series of fewer slices than a volume needs are left out")
    if listing.broken:
        kinds = Counter(type(error).__name__ for _, error in listing.broken)
        notes.append(f"broken files: {', '.join(f'{count} x {kind}' for kind, count in sorted(kinds.items()))}")
    # All are numbered before some are left out, so that a table of what there is speaks of the same patients.
    patients = numbered([_identity(one) for one in series], "patient")
    series = sorted(series, key=lambda one: (patients[_identity(one)], one.refusal is not None, -len(one.slices)))
    sites = [_site(one) for one in series]
    hospitals = numbered([site for site in sites if site], "site") | {"": "unknown-site"}
    if len(set(sites)) == 1:
        hospitals = dict.fromkeys(sites, "local")
    if unnamed := sum(bool(one.slices) and not one.slices[0].patient_known for one in series):
        notes.append(f"{unnamed} series name no patient: those of one study count as one person's")
    if listing.skipped:
        # The ending of a file's name may be part of a patient's.
        reasons = Counter("not DICOM" if reason.endswith("not DICOM") else reason for _, reason in listing.skipped)
        notes.append(f"files passed by: {', '.join(f'{count} x {reason}' for reason, count in reasons.most_common())}")
    scans: Counter[str] = Counter()
    words: Counter[str] = Counter()
    further, found = 0, []
    for one, site in zip(series, sites, strict=True):
        person = patients[_identity(one)]
        scans[person] += 1
        if not (all_series or _is_large(one)):
            continue
        # A patient's series stand in order, the largest usable one first.
        if config.series == "largest" and not all_series and scans[person] > 1:
            further += 1
            continue
        folder = _folder(root, one)
        label, told = disease_in_path(folder.split("/"))
        words.update(told)
        entry = ScanEntry(
            person if scans[person] == 1 else f"{person}-s{scans[person]}",
            hospitals[site],
            root,
            scanner=one.facts.scanner or None,
            label=label,
            files=one.files,
            person=person,
        )
        found.append(Found(entry, one.slices[0].patient if one.slices else "", one.uid, folder))
    if further:
        notes.append(f"{further} further series of patients with several are left out")
    if words:
        named = ", ".join(f"{count} x {word}" for word, count in sorted(words.items()))
        notes.append(f"labels taken from the names of folders: {named}")
    return tuple(found), CLASSES, notes


def _is_large(one: Series) -> bool:
    return not isinstance(one.refusal, TooFewSlices)


def _by_folder(one: Series, reader: ReaderConfig | None) -> list[Series]:
    """Series of the files that have no SeriesInstanceUID, folder by folder."""
    folders: dict[Path, list[Path]] = {}
    for file in one.files:
        folders.setdefault(file.parent, []).append(file)
    return [part for files in folders.values() for part in scan_folder(files, config=reader, processes=1).series]


def _identity(one: Series) -> str:
    """PatientID, or what the reader takes for it; where files have neither, their folder, after all others."""
    identity = one.slices[0].patient if one.slices else ""
    return identity or f"\x7f{one.files[0].parent.as_posix()}"


def _folder(root: Path, one: Series) -> str:
    first = one.files[0].parent
    return first.relative_to(root).as_posix() if first.is_relative_to(root) else ""


def _site(one: Series) -> str:
    """InstitutionName of one of the files; only a number that stands for it is kept."""
    try:
        with quiet_pydicom():
            header = pydicom.dcmread(
                one.files[0], stop_before_pixels=True, force=True, specific_tags=["InstitutionName"]
            )
            return str(header.get("InstitutionName") or "").strip().lower()
    except Exception:  # a damaged header, which the reader names when it comes to the pixels
        return ""
