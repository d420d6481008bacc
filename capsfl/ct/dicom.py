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
import pydicom
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import get_decoder  # pyright: ignore[reportPrivateImportUsage]
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from capsfl.ct import errors
from capsfl.ct.scan import AIR_HU, PADDING_HU, Scan, ScanSource, as_rows, orient, to_patient_axes
from capsfl.ct.stack import Stack, correct_tilt, fill_missing, stack_slices

__all__ = ["Scan", "ScanSource", "SeriesSummary", "list_series", "read_dicom"]

logger = logging.getLogger(__name__)

MIN_SLICES = 4
DICOM_SUFFIXES = {".dcm", ".dicom", ".ima"}
DEFERRED_BYTES = 1 << 15  # pixels stay in the file until their series has been chosen
REFORMATTED = {"MIP", "MINIP", "MPR", "REFORMATTED", "PROJECTION IMAGE", "VOLREN", "SCREEN SAVE"}
READ = (
    *(
        "SOPClassUID",
        "Modality",
        "ImageType",
        "NumberOfFrames",
        "SamplesPerPixel",
        "PhotometricInterpretation",
    ),
    *("StudyInstanceUID", "SeriesInstanceUID", "PatientID", "BurnedInAnnotation"),
    *("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "Rows", "Columns", "SliceThickness"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("Manufacturer", "ManufacturerModelName", "ConvolutionKernel", "KVP"),
)
"""All that is ever read beside the pixels; the identifiers among it leave only as a salted hash."""

HOUNSFIELD_TYPES = {"", "HU", "HU_MOD", "US"}  # US is "unspecified", which anonymisers write


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


@dataclass(frozen=True, eq=False)
class _File:
    path: Path
    header: Dataset
    orientation: np.ndarray  # (6,) row and column cosines
    position: np.ndarray  # (3,) LPS mm
    pixel_spacing: tuple[float, float]  # mm between rows, between columns
    rows: int
    columns: int


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


def _series_groups(folder_or_files: Path | Iterable[Path]) -> tuple[Path, list[list[_File]]]:
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

    files: list[_File] = []
    skipped: Counter[str] = Counter()
    refusal: errors.ScanError | None = None
    for path in paths:
        header = _read_header(path, named=path == place)
        reason = "not DICOM" if header is None else _reason_to_skip(header)
        if header is not None and reason is None:
            try:
                files.append(_geometry(path, header))
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


def _read_header(path: Path, *, named: bool) -> Dataset | None:
    """The data set with its pixels still on disk; None for a file that never claimed to be DICOM."""
    claims = named or path.suffix.lower() in DICOM_SUFFIXES
    try:
        if path.stat().st_size == 0 and claims:
            raise errors.CorruptFile(path, "the file is empty", "copy it again from its source")
        header = pydicom.dcmread(path, defer_size=DEFERRED_BYTES)
        for keyword in READ:  # values are converted on first use, which fails here or never
            header.get(keyword)
        return header
    except errors.ScanError:
        raise
    except InvalidDicomError:
        if path.suffix.lower() not in DICOM_SUFFIXES and path.suffix and not path.suffix[1:].isdigit():
            if named:
                raise errors.NotDicom(path, "not a DICOM file", "give a DICOM series or NIfTI") from None
            return None
    except Exception as error:  # a damaged header makes pydicom raise anything from struct.error on
        raise errors.CorruptFile(path, f"unreadable ({_line(error)})", "copy it again") from error
    # No preamble: old archives write bare data sets, which are DICOM all the same.
    try:
        header = pydicom.dcmread(path, defer_size=DEFERRED_BYTES, force=True)
        if all(header.get(keyword) is not None for keyword in ("SOPClassUID", "Rows")):
            for keyword in READ:
                header.get(keyword)
            return header
    except Exception:  # any bytes at all arrive here
        logger.debug("%s: not DICOM without a preamble either", path)
    if claims:
        raise errors.NotDicom(path, "not a DICOM file", "remove it or copy it again from its source")
    return None


def _reason_to_skip(header: Dataset) -> str | None:
    sop_class = header.get("SOPClassUID")
    if sop_class is not None and sop_class not in (CTImageStorage, EnhancedCTImageStorage):
        name = getattr(sop_class, "name", "")
        return f"{name}, not CT" if name and not name[0].isdigit() else "not CT"
    modality = header.get("Modality")
    if modality not in (None, "", "CT") or (sop_class is None and modality != "CT"):
        return "not CT"
    kinds = {str(value).upper() for value in _several(header.get("ImageType"))}
    if "LOCALIZER" in kinds:
        return "localizer"
    if kinds & REFORMATTED or ("DERIVED" in kinds and "AXIAL" not in kinds):
        return "derived image"
    return None


def _geometry(path: Path, header: Dataset) -> _File:
    frames, samples = _number(header, "NumberOfFrames"), _number(header, "SamplesPerPixel")
    if header.get("SOPClassUID") == EnhancedCTImageStorage or (frames or 1) > 1:
        raise errors.UnsupportedMultiframe(
            path, "enhanced multi-frame CT", "convert it to single-frame CT or to NIfTI (dcm2niix)"
        )
    color = str(header.get("PhotometricInterpretation", "MONOCHROME2"))
    if (samples or 1) != 1 or not color.startswith("MONOCHROME"):
        raise errors.UnsupportedColor(
            path, "colour pixels, not Hounsfield units", "give the original CT slices, not screen captures"
        )
    try:
        orientation = np.array([float(value) for value in header.ImageOrientationPatient])
        position = np.array([float(value) for value in header.ImagePositionPatient])
        row_spacing, column_spacing = (float(value) for value in header.PixelSpacing)
        rows, columns = int(header.Rows), int(header.Columns)
    except (AttributeError, TypeError, ValueError) as error:
        raise errors.InconsistentGeometry(
            path, f"position, orientation or pixel spacing is absent ({_line(error)})", "export it again"
        ) from error
    unit = np.array([orientation[:3] @ orientation[:3], orientation[3:] @ orientation[3:]])
    finite = np.all(np.isfinite(np.concatenate([orientation, position])))
    if not finite or np.abs(unit - 1).max() > 1e-3 or abs(orientation[:3] @ orientation[3:]) > 1e-3:
        raise errors.InconsistentGeometry(
            path, "the orientation's two directions are not orthogonal unit vectors", "export it again"
        )
    if not (0 < row_spacing < np.inf and 0 < column_spacing < np.inf):
        raise errors.InconsistentGeometry(
            path, f"pixel spacing {row_spacing} x {column_spacing} mm", "export the series again"
        )
    return _File(path, header, orientation, position, (row_spacing, column_spacing), rows, columns)


def _group(files: list[_File]) -> list[list[_File]]:
    groups: list[list[_File]] = []
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


def _choose(groups: list[list[_File]], series: str | None, place: Path) -> list[_File]:
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
    files: list[_File],
    place: Path,
    allow_interpolation: bool,
    allow_tilt_correction: bool,
    salt: bytes | None,
) -> Scan:
    pixels: dict[int, np.ndarray] = {}

    def stored(index: int) -> np.ndarray:
        if index not in pixels:
            pixels[index] = _stored_values(files[index])
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
        _to_hounsfield(files[index], stored(index), hu[target], valid[target])
        pixels.pop(index)
    hu, valid = fill_missing(hu, valid, stack)
    if stack.tilt_degrees:
        hu, valid = correct_tilt(hu, valid, stack)
    return _scan(hu, valid, stack, files, place, salt)


def _scan(
    hu: np.ndarray, valid: np.ndarray, stack: Stack, files: list[_File], place: Path, salt: bytes | None
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
        manufacturer=_text(header, "Manufacturer"),
        model=_text(header, "ManufacturerModelName"),
        kernel=_text(header, "ConvolutionKernel"),
        slice_thickness_mm=_number(header, "SliceThickness"),
        tube_voltage_kv=_number(header, "KVP"),
        burned_in_annotation=burned_in,
        dropped_duplicates=len(files) - len(stack.order),
        interpolated_slices=stack.missing,
        corrected_tilt_degrees=stack.tilt_degrees,
    )
    oriented = np.ascontiguousarray(to_patient_axes(hu, axes, flips))
    return Scan(oriented, np.ascontiguousarray(to_patient_axes(valid, axes, flips)), affine, source)


def _stored_values(file: _File) -> np.ndarray:
    """Decode a slice as its stored integers, (rows, columns)."""
    header = file.header
    if not isinstance(getattr(header, "file_meta", None), FileMetaDataset):
        header.file_meta = FileMetaDataset()
    if "TransferSyntaxUID" not in header.file_meta:
        implicit, little = header.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    syntax = header.file_meta.TransferSyntaxUID
    if syntax.is_compressed:
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:
            available = False
        if not available:
            raise errors.MissingDecoder(
                file.path, f"compressed as {syntax.name}", "decode it with: pip install 'capsfl[dicom]'"
            )
    try:
        stored = header.pixel_array
    except Exception as error:  # decoders are third-party code: whatever they raise, the file is at fault
        raise errors.CorruptFile(
            file.path, f"the pixels do not decode ({_line(error)})", "copy or export the slice again"
        ) from error
    if stored.shape != (file.rows, file.columns):
        raise errors.CorruptFile(
            file.path,
            f"pixels of shape {stored.shape}, header says {file.rows}x{file.columns}",
            "export it again",
        )
    return stored


def _to_hounsfield(file: _File, stored: np.ndarray, hu: np.ndarray, valid: np.ndarray) -> None:
    """Write one slice's Hounsfield units and validity in place; padding is found before the rescale."""
    header = file.header
    slope, intercept = _number(header, "RescaleSlope"), _number(header, "RescaleIntercept")
    kind = _text(header, "RescaleType").upper()
    if slope is None or intercept is None or slope == 0 or kind not in HOUNSFIELD_TYPES:
        fault = "no usable RescaleSlope and RescaleIntercept"
        if kind not in HOUNSFIELD_TYPES:
            fault = "RescaleType is not HU"
        raise errors.MissingRescale(file.path, fault, "Hounsfield units are never guessed: export it again")
    np.multiply(stored, np.float32(slope), out=hu, casting="unsafe")
    hu += np.float32(intercept)
    padding = hu < PADDING_HU
    for low, high in _padding_ranges(header, stored.dtype):
        padding |= (stored >= low) & (stored <= high)
    np.logical_not(padding, out=valid)
    hu[padding] = AIR_HU


def _padding_ranges(header: Dataset, dtype: np.dtype) -> Iterator[tuple[int, int]]:
    value, limit = _number(header, "PixelPaddingValue"), _number(header, "PixelPaddingRangeLimit")
    if value is None:
        return
    limits = np.iinfo(dtype)

    def fitted(number: int) -> int:
        # Writers store the signed -2000 as the unsigned 63536 and the other way round.
        span = 1 << limits.bits
        return number if limits.min <= number <= limits.max else (number - limits.min) % span + limits.min

    low = fitted(int(value))
    high = low if limit is None else fitted(int(limit))
    yield min(low, high), max(low, high)


def _summaries(groups: list[list[_File]], place: Path) -> tuple[SeriesSummary, ...]:
    return tuple(
        SeriesSummary(
            number,
            _uid(group[0])[1],
            len(group),
            group[0].rows,
            group[0].columns,
            group[0].pixel_spacing,
            _text(group[0].header, "ConvolutionKernel"),
        )
        for number, group in enumerate(groups, start=1)
    )


def _uid(file: _File) -> tuple[str, str]:
    return str(file.header.get("StudyInstanceUID", "")), str(file.header.get("SeriesInstanceUID", ""))


def _pseudonym(header: Dataset, salt: bytes | None) -> str:
    identity = str(header.get("PatientID") or header.get("StudyInstanceUID") or "")
    digest = hashlib.sha256((salt or secrets.token_bytes(32)) + identity.encode())
    return f"patient-{digest.hexdigest()[:16]}"


def _text(header: Dataset, keyword: str) -> str:
    value = header.get(keyword)
    return " ".join(str(part) for part in _several(value)).strip()[:64]


def _number(header: Dataset, keyword: str) -> float | None:
    try:
        number = float(header.get(keyword))  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def _several(value: object) -> list[object]:
    if value is None:
        return []
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def _line(error: Exception) -> str:
    """The first line of a library's message, short enough for one of ours."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:120]
