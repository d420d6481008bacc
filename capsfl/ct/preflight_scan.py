"""One scan looked at before anything is stored: what it is, whether it can be used, what its values say."""

import hmac
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from capsfl.ct.collections import ScanEntry, is_nifti
from capsfl.ct.deidentify import identifying_words, shown
from capsfl.ct.errors import ScanError
from capsfl.ct.ingest_scan import read_scan
from capsfl.ct.lungs import lung_mask
from capsfl.ct.picture_files import read_picture, to_square
from capsfl.ct.reader import ReaderConfig
from capsfl.ct.scan import Scan
from capsfl.ct.series import Series, scan_folder
from capsfl.ct.walk import walk

HU_EDGES = np.arange(-1104, 1617, 16)
"""Edges of the histogram of a volume; what lies outside counts in the first and the last bin."""
GREY_EDGES = np.arange(0, 257, 8)
"""Edges of the histogram of pictures."""
LUNG_SPACING_MM = 2.5
"""Grid on which lung volume is measured."""
AIR_HU_TOLERANCE = 40
LOOK_SIDE = 16
LOOK_GREYS = 31
"""Levels to a standard deviation."""
MAX_SERIES = 20
SHORTEST_NAME = 3
UID = re.compile(r",? UID \S+|\d+(?:\.\d+){3,}")
"""As the reader's lists write a series' identifier, and as DICOM does."""
CUT_SHARE = 0.15
"""A lung whose first or last cross-section is this share of its largest goes on outside the scan."""


@dataclass(frozen=True)
class SeriesFinding:
    """What is shown of one series or one patient's pictures; nothing in it identifies anybody."""

    hospital: str
    patient: str
    """The manifest's pseudonym, or a number."""
    kind: str
    """volume or pictures."""
    images: int
    """Slices or pictures."""
    rows: int = 0
    columns: int = 0
    spacing_mm: tuple[float, float, float] | None = None
    """Along (z, y, x) of the patient."""
    scanner: str = ""
    kernel: str = ""
    slice_thickness_mm: float | None = None
    tube_voltage_kv: float | None = None
    encoding: str = ""
    """Transfer syntax; NIfTI; formats and modes of pictures with their counts."""
    label: int | None = None
    split: str = ""
    fault: str = ""
    """Class of the refusal; empty for what can be used."""
    reason: str = ""
    remedy: str = ""
    warnings: tuple[str, ...] = ()
    padding_share: float | None = None
    """Share of voxels that the scanner marked as no measurement."""
    lung_ml: float | None = None
    """Volume of both lungs; 0 where none was found."""
    histogram: tuple[int, ...] = ()
    """Counts between `HU_EDGES`, or `GREY_EDGES` for pictures."""
    identity: str = ""
    """Salted hash of the patient's id, of this run; empty where there is none."""
    digests: tuple[str, ...] = ()
    """Salted hash of the pixels of every image that shows anything, of this run."""
    looks: bytes = field(default=b"", repr=False)
    """For every picture `LOOK_SIDE` squared int8: what is left of it after every resizing and windowing."""

    @property
    def accepted(self) -> bool:
        """Whether ingestion would take it."""
        return not self.fault


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the readers' remarks off the console: they name files, and the finding says the same without."""
    log = logging.getLogger("capsfl.ct")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@_silent()
def examine(entry: ScanEntry, reader: ReaderConfig, salt: bytes) -> SeriesFinding:
    """Look at one entry; a fault of the scan is a finding.

    Args:
        entry: a scan, or the pictures of a patient.
        reader: what the readers may mend.
        salt: secret bytes for the hashes; one salt for all scans that are to be compared.
    """
    base: dict[str, Any] = {"hospital": entry.hospital, "patient": entry.patient}
    base |= {"label": entry.label, "split": entry.split or ""}
    if entry.kind == "pictures":
        return _pictures(entry, base, salt)
    series, words = _series(entry, reader, salt)
    if series is not None:
        facts = series.facts
        base |= {
            "kernel": facts.kernel,
            "slice_thickness_mm": facts.slice_thickness_mm,
            "tube_voltage_kv": facts.tube_voltage_kv,
            "encoding": series.transfer_syntax,
            "identity": series.pseudonym if series.slices and series.slices[0].patient else "",
        }
        base["scanner"] = entry.scanner or facts.scanner
    else:
        base |= {"scanner": entry.scanner or "", "encoding": "NIfTI" if is_nifti(entry.image) else ""}
    try:
        scan = read_scan(entry, reader, salt)
    except ScanError as error:
        refused = _refusal(error, entry, series, words)
        if series is not None:
            refused |= {"images": len(series.slices), "rows": series.rows, "columns": series.columns}
        return SeriesFinding(**base, **refused)
    except OSError as error:
        return SeriesFinding(**base, kind="volume", images=0, fault="Unreadable", reason=str(error.strerror or ""))
    return SeriesFinding(**base, **_measured(scan, salt))


def _series(entry: ScanEntry, reader: ReaderConfig, salt: bytes) -> tuple[Series | None, frozenset[str]]:
    """The one DICOM series of an entry by its headers, None where there is none or a choice; identifying words."""
    if is_nifti(entry.image):
        return None, frozenset()
    try:
        listing = scan_folder(entry.files or entry.image, config=reader, salt=salt, processes=1)
    except ScanError:
        return None, frozenset()
    words = frozenset[str]().union(*(identifying_words(one.files[0]) for one in listing.series[:MAX_SERIES]))
    found = [one for one in listing.series if entry.series is None or one.uid.endswith(entry.series)]
    if len(found) > 1:
        usable = [one for one in found if one.refusal is None]
        found = usable if len(usable) == 1 else []
    return (found[0] if found else None), words


def _refusal(error: ScanError, entry: ScanEntry, series: Series | None, words: frozenset[str]) -> dict[str, Any]:
    """What may be said of a refusal: not where, because folders and files may bear a patient's name."""
    files = series.files if series is not None else entry.files or walk(entry.image).files
    names = {file.name for file in files} | {file.stem for file in files} | set(entry.image.parts[1:])
    told = {"reason": error.fault, "remedy": error.remedy}
    for key, text in told.items():
        for name in sorted(names, key=len, reverse=True):
            if len(name) >= SHORTEST_NAME:
                text = text.replace(name, "…")
        told[key] = shown(UID.sub("", text), words)
    return {"kind": "volume", "images": 0, "fault": type(error).__name__, **told}


def _measured(scan: Scan, salt: bytes) -> dict[str, Any]:
    """Figures of a scan that could be read."""
    source = scan.source
    counts = _histogram(scan.hu[scan.valid], HU_EDGES)
    strides = [max(1, round(LUNG_SPACING_MM / spacing)) for spacing in scan.spacing_mm]
    coarse = scan.hu[:: strides[0], :: strides[1], :: strides[2]]
    z, y, x = (stride * spacing for stride, spacing in zip(strides, scan.spacing_mm, strict=True))
    lungs = lung_mask(coarse, (z, y, x))
    lung_ml = float(lungs.sum() * z * y * x / 1000)
    warnings = []
    if source.burned_in_annotation:
        warnings.append("declares burned-in annotation")
    if source.dropped_duplicates:
        warnings.append(f"{source.dropped_duplicates} slices twice, dropped")
    if source.interpolated_slices:
        warnings.append(f"{source.interpolated_slices} slices missing, interpolated")
    if source.corrected_tilt_degrees:
        warnings.append(f"gantry tilt of {source.corrected_tilt_degrees:.1f} degrees, corrected")
    air = HU_EDGES[:-1][HU_EDGES[:-1] < -700]
    peak = int(air[np.argmax(counts[: len(air)])]) + 8
    if sum(counts[: len(air)]) and not lungs.any():
        warnings.append("no lung found")
    elif abs(peak + 1000) > AIR_HU_TOLERANCE and peak < -900:
        warnings.append(f"air at {peak} HU")
    area = lungs.sum(axis=(1, 2))
    for end, where in ((0, "lowest"), (-1, "highest")):
        if lungs.any() and area[end] > CUT_SHARE * area.max():
            warnings.append(f"lung reaches the {where} slice")
    planes = np.rint(scan.hu).astype(np.int16)
    return {
        "kind": "volume",
        "images": scan.hu.shape[0],
        "rows": scan.hu.shape[1],
        "columns": scan.hu.shape[2],
        "spacing_mm": tuple(round(value, 4) for value in scan.spacing_mm),
        "padding_share": float(1 - scan.valid.mean()),
        "lung_ml": lung_ml,
        "warnings": tuple(warnings),
        "histogram": counts,
        "digests": _digests(planes, salt),
    }


def _pictures(entry: ScanEntry, base: dict[str, Any], salt: bytes) -> SeriesFinding:
    """Figures of a patient's pictures, in the modes of their files."""
    formats: Counter[str] = Counter()
    counts = np.zeros(len(GREY_EDGES) - 1, int)
    pictures: list[np.ndarray] = []
    base = {**base, "kind": "pictures", "images": len(entry.files), "scanner": entry.scanner or ""}
    for number, path in enumerate(entry.files, start=1):
        try:
            pictures.append(read_picture(path))
        except ScanError as error:
            reason = f"picture {number} of {len(entry.files)}: {error.fault}"
            return SeriesFinding(**base, fault=type(error).__name__, reason=reason, remedy=error.remedy)
        with Image.open(path) as image:
            formats[f"{image.format} {image.mode}"] += 1
        counts += np.array(_histogram(pictures[-1], GREY_EDGES))
    heights, widths = np.array([picture.shape for picture in pictures]).T
    return SeriesFinding(
        **base,
        rows=int(np.median(heights)),
        columns=int(np.median(widths)),
        encoding=", ".join(f"{count} x {name}" for name, count in sorted(formats.items())),
        histogram=tuple(int(count) for count in counts),
        digests=_digests(pictures, salt),
        looks=b"".join(map(_look, pictures)),
    )


def _histogram(values: np.ndarray, edges: np.ndarray) -> tuple[int, ...]:
    step = int(edges[1] - edges[0])
    bins = ((values - edges[0]) // step).astype(np.int64).clip(0, len(edges) - 2)
    return tuple(int(count) for count in np.bincount(bins.ravel(), minlength=len(edges) - 1))


def _look(picture: np.ndarray) -> bytes:
    """A picture small and standardized: what two publications of one slice have in common."""
    small = to_square(picture, LOOK_SIDE, fit="stretch").astype(np.float32)
    values = LOOK_GREYS * (small - small.mean()) / max(float(small.std()), 1.0)
    return np.rint(values).clip(-127, 127).astype(np.int8).tobytes()


def _digests(images: Iterable[np.ndarray], salt: bytes) -> tuple[str, ...]:
    """Keyed hashes of the images that show anything: slices of air alone are the same in everybody."""
    found = []
    for image in images:
        if image.min() != image.max():
            content = f"{image.dtype.str} {image.shape}\n".encode() + np.ascontiguousarray(image).tobytes()
            found.append(hmac.digest(salt, content, "sha256").hex()[:32])
    return tuple(found)
