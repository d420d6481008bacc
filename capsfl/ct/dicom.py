"""DICOM series to a scan: order, spacing and Hounsfield units from what the files say, or a named error."""

import hashlib
import logging
import secrets
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset

from capsfl.ct import errors
from capsfl.ct.scan import Scan, ScanSource, as_rows, orient, to_patient_axes
from capsfl.ct.slices import (
    DicomSlice,
    header_number,
    header_text,
    read_header,
    reason_to_skip,
    slice_of,
    stored_values,
    to_hounsfield,
)
from capsfl.ct.stack import Stack, correct_tilt, fill_missing, stack_slices

__all__ = ["Scan", "ScanSource", "SeriesSummary", "list_series", "read_dicom"]

logger = logging.getLogger(__name__)

MIN_SLICES = 4


@dataclass(frozen=True)
class SeriesSummary:
    """One series of a folder, as an error or a table lists it."""

    number: int
    """Position in the list, from 1; `series` accepts it."""
    uid: str
    """Series Instance UID; `series` accepts it or its ending."""
    slices: int
    rows: int
    columns: int
    pixel_spacing_mm: tuple[float, float]
    kernel: str

    def __str__(self) -> str:
        spacing = self.pixel_spacing_mm[0]
        return (
            f"{self.number}: {self.slices} slices of {self.rows}x{self.columns}, {spacing:.3f} mm, "
            f"kernel {self.kernel or 'unknown'}, UID ...{self.uid[-12:]}"
        )


def list_series(folder_or_files: Path | Iterable[Path]) -> tuple[SeriesSummary, ...]:
    """List the CT series of a folder (searched in depth) or of some files, in the order of their UIDs.

    Raises:
        NoSeries: nothing in it is a CT series.
        NotDicom, CorruptFile: a file named like DICOM cannot be read.
    """
    with _quiet_pydicom():
        place, groups = _series_groups(folder_or_files)
        return _summaries(groups, place)


def read_dicom(
    folder_or_files: Path | Iterable[Path],
    *,
    series: str | None = None,
    allow_interpolation: bool = False,
    allow_tilt_correction: bool = False,
    salt: bytes | None = None,
) -> Scan:
    """Read one CT series as a volume in Hounsfield units with the patient's axes.

    Slices are ordered by their position along the slice normal, spacing comes from positions, padding is
    recognised on the stored values, and the rescale is taken slice by slice.

    Args:
        folder_or_files: a folder (searched in depth) or the files themselves.
        series: which series, if there are several: its number in the list, its UID or the UID's ending.
        allow_interpolation: fill missing slices linearly; the number is recorded in the source.
        allow_tilt_correction: undo a gantry tilt by shearing; the angle is recorded in the source.
        salt: secret bytes for the patient's pseudonym; fresh ones when None, so that pseudonyms of two
            calls cannot be joined.

    Raises:
        ScanError: the subclass names the fault, its message the file or folder and the remedy.
    """
    with _quiet_pydicom():
        place, groups = _series_groups(folder_or_files)
        files = _choose(groups, series, place)
        return _assemble(files, place, allow_interpolation, allow_tilt_correction, salt)


@contextmanager
def _quiet_pydicom() -> Iterator[None]:
    """Keep pydicom from printing and logging odd values: they may be the patient's, and are checked here."""
    log = logging.getLogger("pydicom")
    disabled = log.disabled
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        log.disabled = True
        try:
            yield
        finally:
            log.disabled = disabled


def _series_groups(folder_or_files: Path | Iterable[Path]) -> tuple[Path, list[list[DicomSlice]]]:
    """Usable files by study, series and grid; the reasons for the others go to the log and to the errors."""
    if isinstance(folder_or_files, str | Path):
        place = Path(folder_or_files)
        if not place.exists():
            raise errors.NoSeries(place, "no such file or folder", "check the path")
        paths = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    else:
        paths = [Path(path) for path in folder_or_files]
        place = paths[0].parent if paths else Path()
    if not paths:
        raise errors.NoSeries(place, "the folder is empty", "give the folder that holds the series' files")

    files: list[DicomSlice] = []
    skipped: Counter[str] = Counter()
    refusal: errors.ScanError | None = None
    for path in paths:
        header = read_header(path, named=path == place)
        reason = "not DICOM" if header is None else reason_to_skip(header)
        if header is not None and reason is None:
            try:
                files.append(slice_of(path, header))
                continue
            except (errors.UnsupportedMultiframe, errors.UnsupportedColor) as error:
                refusal = refusal or error
                reason = error.fault
        if header is None and path.suffix:
            reason = f"{path.suffix.lower()} file, not DICOM"
        logger.info("%s skipped: %s", path, reason)
        skipped[str(reason)] += 1
    if not files:
        if refusal is not None:
            raise refusal
        found = ", ".join(f"{count} x {reason}" for reason, count in skipped.most_common(4))
        raise errors.NoSeries(place, f"no CT series (found {found})", "give a folder of axial CT slices")
    return place, _group(files)


def _group(files: list[DicomSlice]) -> list[list[DicomSlice]]:
    groups: list[list[DicomSlice]] = []
    for file in files:
        for group in groups:
            first = group[0]
            if (
                _uid(first) == _uid(file)
                and (first.rows, first.columns) == (file.rows, file.columns)
                and np.allclose(first.orientation, file.orientation, rtol=0.0, atol=2e-3)
                and np.allclose(first.pixel_spacing, file.pixel_spacing, rtol=1e-3, atol=0.0)
            ):
                group.append(file)
                break
        else:
            groups.append([file])
    return sorted(groups, key=lambda group: (_uid(group[0]), -len(group)))


def _choose(groups: list[list[DicomSlice]], series: str | None, place: Path) -> list[DicomSlice]:
    summaries = _summaries(groups, place)
    if series is not None:
        chosen = [
            group
            for group, summary in zip(groups, summaries, strict=True)
            if str(summary.number) == series or (len(series) > 3 and summary.uid.endswith(series))
        ]
        if len(chosen) != 1:
            listed = " | ".join(map(str, summaries))
            fault = f"--series {series} matches {len(chosen)} of {len(groups)} series"
            raise errors.SeveralSeries(place, fault, f"choose one of: {listed}")
        groups = chosen
    large = [group for group in groups if len(group) >= MIN_SLICES]
    if not large:
        most = max(len(group) for group in groups)
        fault = f"{most} slice{'s' if most != 1 else ''} in the largest series"
        raise errors.TooFewSlices(place, fault, f"a volume needs at least {MIN_SLICES}")
    for group in groups:
        if len(group) >= MIN_SLICES:
            continue
        if any(_uid(other[0]) == _uid(group[0]) for other in large):
            raise errors.InconsistentGeometry(
                group[0].path, "its grid or orientation differs from the rest of its series", "remove it"
            )
        logger.info("%s skipped: a series of %d slices", group[0].path, len(group))
    if len(large) > 1:
        listed = " | ".join(map(str, summaries))
        raise errors.SeveralSeries(place, f"{len(large)} series", f"choose one with --series: {listed}")
    return large[0]


def _assemble(
    files: list[DicomSlice],
    place: Path,
    allow_interpolation: bool,
    allow_tilt_correction: bool,
    salt: bytes | None,
) -> Scan:
    pixels: dict[int, np.ndarray] = {}

    def stored(index: int) -> np.ndarray:
        if index not in pixels:
            pixels[index] = stored_values(files[index])
        return pixels[index]

    first = files[0]
    stack = stack_slices(
        np.stack([file.position for file in files]),
        np.mean([file.orientation for file in files], axis=0),
        first.pixel_spacing,
        same=lambda a, b: np.array_equal(stored(a), stored(b)),
        names=[file.path.name for file in files],
        place=place,
        allow_interpolation=allow_interpolation,
        allow_tilt_correction=allow_tilt_correction,
    )
    if len(stack.order) < MIN_SLICES:
        raise errors.TooFewSlices(
            place, f"{len(stack.order)} different slices", f"a volume needs at least {MIN_SLICES}"
        )
    hu = np.empty((len(stack.order), first.rows, first.columns), np.float32)
    valid = np.ones(hu.shape, bool)
    for target, index in enumerate(stack.order):
        to_hounsfield(files[index], stored(index), hu[target], valid[target])
        pixels.pop(index)
    hu, valid = fill_missing(hu, valid, stack)
    if stack.tilt_degrees:
        hu, valid = correct_tilt(hu, valid, stack)
    return _scan(hu, valid, stack, files, place, salt)


def _scan(
    hu: np.ndarray, valid: np.ndarray, stack: Stack, files: list[DicomSlice], place: Path, salt: bytes | None
) -> Scan:
    shape = (hu.shape[0], hu.shape[1], hu.shape[2])
    axes, flips, affine = orient(stack.affine, shape, place=place)
    header = files[0].header
    burned_in = str(header.get("BurnedInAnnotation", "")).upper() == "YES"
    if burned_in:
        logger.warning("%s: the series declares burned-in annotation; check it before sharing", place)
    source = ScanSource(
        format="dicom",
        pseudonym=_pseudonym(header, salt),
        shape=shape,
        affine=as_rows(stack.affine),
        axes=axes,
        flips=flips,
        manufacturer=header_text(header, "Manufacturer"),
        model=header_text(header, "ManufacturerModelName"),
        kernel=header_text(header, "ConvolutionKernel"),
        slice_thickness_mm=header_number(header, "SliceThickness"),
        tube_voltage_kv=header_number(header, "KVP"),
        burned_in_annotation=burned_in,
        dropped_duplicates=len(files) - len(stack.order),
        interpolated_slices=stack.missing,
        corrected_tilt_degrees=stack.tilt_degrees,
    )
    oriented = np.ascontiguousarray(to_patient_axes(hu, axes, flips))
    return Scan(oriented, np.ascontiguousarray(to_patient_axes(valid, axes, flips)), affine, source)


def _summaries(groups: list[list[DicomSlice]], place: Path) -> tuple[SeriesSummary, ...]:
    return tuple(
        SeriesSummary(
            number,
            _uid(group[0])[1],
            len(group),
            group[0].rows,
            group[0].columns,
            group[0].pixel_spacing,
            header_text(group[0].header, "ConvolutionKernel"),
        )
        for number, group in enumerate(groups, start=1)
    )


def _uid(file: DicomSlice) -> tuple[str, str]:
    return str(file.header.get("StudyInstanceUID", "")), str(file.header.get("SeriesInstanceUID", ""))


def _pseudonym(header: Dataset, salt: bytes | None) -> str:
    identity = str(header.get("PatientID") or header.get("StudyInstanceUID") or "")
    digest = hashlib.sha256((salt or secrets.token_bytes(32)) + identity.encode())
    return f"patient-{digest.hexdigest()[:16]}"
