"""DICOM series to a scan: order, spacing and Hounsfield units from what the files say, or a named error."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from capsfl.ct import errors
from capsfl.ct.errors import printable
from capsfl.ct.headers import quiet_pydicom
from capsfl.ct.pixels import decode, to_hounsfield
from capsfl.ct.reader import ReaderConfig
from capsfl.ct.scan import SOFTEST_AIR_HU, Scan, ScanSource, as_rows, orient
from capsfl.ct.series import MIN_SLICES, FolderListing, Series, scan_folder
from capsfl.ct.stack import Stack, fill_missing, shear

__all__ = ["FolderListing", "ReaderConfig", "Scan", "ScanSource", "Series", "read_dicom", "read_series", "scan_folder"]

logger = logging.getLogger(__name__)

LISTED_SERIES = 6
"""Series that a message lists before it counts the rest."""


def read_dicom(
    folder_or_files: Path | Iterable[Path],
    *,
    series: str | None = None,
    config: ReaderConfig | None = None,
    salt: bytes | None = None,
) -> Scan:
    """Read one CT series as a volume in Hounsfield units with the patient's axes.

    Slices are ordered by their position along the slice normal, spacing comes from positions, padding is
    recognised on the stored values, and the rescale is taken slice by slice.

    Args:
        folder_or_files: a folder (searched in depth) or the files themselves.
        series: which series, if there are several: its number in the list, its UID or the UID's ending.
        config: what may be mended: missing slices, gantry tilt.
        salt: secret bytes for the patient's pseudonym; fresh ones when None, so that pseudonyms of two
            calls cannot be joined.

    Raises:
        ScanError: the subclass names the fault, its message the file or folder and the remedy.
    """
    return read_series(_choose(scan_folder(folder_or_files, config=config, salt=salt, processes=1), series))


def read_series(series: Series) -> Scan:
    """Read the pixels of a series that `scan_folder` listed, each once.

    Raises:
        ScanError: the series' own refusal, or what its pixels show: CorruptFile, DuplicatePositions, WrongFormat.
    """
    if series.refusal is not None:
        raise series.refusal
    stack = series.stack
    assert stack is not None
    shape = stack.grid(series.rows, series.columns)
    axes, flips, affine = orient(stack.affine, shape, place=series.place)
    source = ScanSource(
        format="dicom",
        pseudonym=series.pseudonym,
        shape=shape,
        affine=as_rows(stack.affine),
        axes=axes,
        flips=flips,
        manufacturer=series.facts.manufacturer,
        model=series.facts.model,
        kernel=series.facts.kernel,
        slice_thickness_mm=series.facts.slice_thickness_mm,
        tube_voltage_kv=series.facts.tube_voltage_kv,
        burned_in_annotation=series.facts.burned_in_annotation,
        dropped_duplicates=len(stack.duplicates),
        interpolated_slices=stack.missing,
        corrected_tilt_degrees=stack.tilt_degrees,
        patient_known=series.slices[0].patient_known,
    )
    if source.burned_in_annotation:
        logger.warning("%s: the series declares burned-in annotation; check it before sharing", printable(series.place))
    hu = np.empty([shape[axis] for axis in axes], np.float32)
    valid = np.empty(hu.shape, bool)
    # Slices are written through a view in the series' own order, so that the volume is never held twice.
    with quiet_pydicom():
        lowest = _fill(series, stack, source.to_series(hu), source.to_series(valid))
    if not lowest < SOFTEST_AIR_HU:
        raise errors.WrongFormat(
            series.place,
            f"not Hounsfield units (the lowest value is {lowest:g}, air is -1000)",
            "export the original CT, not a windowed picture",
        )
    return Scan(hu, valid, affine, source)


def _fill(series: Series, stack: Stack, hu: np.ndarray, valid: np.ndarray) -> float:
    """Decode all slices into the (slice, row, column) arrays, each once; the lowest valid HU."""
    plane_of = dict(zip(stack.order, stack.planes, strict=True))
    plane_of |= {dropped: plane_of[kept] for kept, dropped in stack.duplicates}
    written: dict[int, str] = {}
    lowest = np.inf
    for index, stored in decode(series.slices):
        file, plane = series.slices[index], plane_of[index]
        twin = written.get(plane)
        out, kept = (hu[plane], valid[plane]) if twin is None else _buffers(hu.shape[1:])
        if stack.tilt_degrees:
            slice_hu, slice_valid = _buffers(stored.shape)
            lowest = min(lowest, to_hounsfield(file, stored, slice_hu, slice_valid))
            shear(slice_hu, slice_valid, stack, plane, out, kept)
        else:
            lowest = min(lowest, to_hounsfield(file, stored, out, kept))
        if twin is None:
            written[plane] = file.name
        elif np.array_equal(out, hu[plane]) and np.array_equal(kept, valid[plane]):
            logger.warning("%s: dropped, the same slice as %s", printable(series.place / file.name), printable(twin))
        else:
            along = float(np.dot(file.position, stack.affine[:3, 0]) / stack.spacing_mm)
            raise errors.DuplicatePositions(
                series.place,
                f"{twin} and {file.name} differ at one position ({along:.2f} mm along the normal)",
                "keep one phase or reconstruction per folder",
            )
    fill_missing(hu, valid, stack)
    return lowest


def _buffers(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    return np.empty(shape, np.float32), np.empty(shape, bool)


def _choose(listing: FolderListing, wanted: str | None) -> Series:
    """The one series to read; what is no volume is passed by with a logged reason."""
    if wanted is not None:
        chosen = [
            series
            for series in listing.series
            if str(series.number) == wanted or (len(wanted) > 3 and series.uid.endswith(wanted))
        ]
        if len(chosen) != 1:
            raise errors.SeveralSeries(
                listing.place,
                f"--series {wanted} matches {len(chosen)} of {len(listing.series)} series",
                f"choose one of: {_listed(listing.series)}",
            )
        return chosen[0]
    if listing.broken:
        raise listing.broken[0][1]
    if not listing.series:
        raise errors.NoSeries(listing.place, f"no CT series (found {listing.found()})", "give a folder of CT slices")
    large = [series for series in listing.series if len(series.slices) >= MIN_SLICES]
    if not large:
        refusal = max(listing.series, key=lambda series: len(series.slices)).refusal
        assert refusal is not None  # too few slices, at the least
        raise refusal
    for series in listing.series:
        if series not in large:
            first, *others = series.files
            more = f" and {len(others)} more" if others else ""
            fault = series.refusal.fault if series.refusal is not None else ""
            logger.warning("%s%s left out: %s", printable(first), more, fault)
    if len(large) > 1:
        fault = f"{len(large)} series"
        raise errors.SeveralSeries(listing.place, fault, f"choose one with --series: {_listed(large)}")
    return large[0]


def _listed(series: Sequence[Series]) -> str:
    names = [str(one) for one in series[:LISTED_SERIES]]
    more = len(series) - len(names)
    return " | ".join(names) + (f" | and {more} more" if more > 0 else "")
