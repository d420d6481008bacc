"""One DICOM file: its header, whether it is a CT slice, where it lies, and its Hounsfield units."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import get_decoder  # pyright: ignore[reportPrivateImportUsage]
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from capsfl.ct import errors
from capsfl.ct.scan import AIR_HU, PADDING_HU

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, eq=False)
class DicomSlice:
    path: Path
    header: Dataset
    orientation: np.ndarray  # (6,) row and column cosines
    position: np.ndarray  # (3,) LPS mm
    pixel_spacing: tuple[float, float]  # mm between rows, between columns
    rows: int
    columns: int


def read_header(path: Path, *, named: bool) -> Dataset | None:
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
        raise errors.CorruptFile(path, f"the header is damaged ({type(error).__name__})", "copy it again") from error
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


def reason_to_skip(header: Dataset) -> str | None:
    """Say why a data set is no slice of a CT volume; None when it is one. No tag value is quoted."""
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


def slice_of(path: Path, header: Dataset) -> DicomSlice:
    """Take the slice's place in space from its header.

    Raises:
        UnsupportedMultiframe, UnsupportedColor: not a single grey slice.
        InconsistentGeometry: position, orientation or pixel spacing is absent or makes no sense.
    """
    frames, samples = header_number(header, "NumberOfFrames"), header_number(header, "SamplesPerPixel")
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
    except (AttributeError, TypeError, ValueError):
        raise errors.InconsistentGeometry(
            path, "position, orientation or pixel spacing is absent or no number", "export it again"
        ) from None
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
    return DicomSlice(path, header, orientation, position, (row_spacing, column_spacing), rows, columns)


def stored_values(file: DicomSlice) -> np.ndarray:
    """Decode a slice as its stored integers, (rows, columns).

    Raises:
        MissingDecoder: compressed, and no installed package decodes it.
        CorruptFile: truncated, or the pixels contradict the header.
    """
    header = file.header
    syntax = _transfer_syntax(header)
    if not syntax.is_transfer_syntax:
        raise errors.CorruptFile(file.path, "its transfer syntax is none", "copy or export the slice again")
    if syntax.is_compressed and not _decodes(syntax):
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


def _transfer_syntax(header: Dataset) -> UID:
    """The encoding the file names, or the one it was parsed with if it names none."""
    if not isinstance(getattr(header, "file_meta", None), FileMetaDataset):
        header.file_meta = FileMetaDataset()
    if "TransferSyntaxUID" not in header.file_meta:
        implicit, little = header.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return UID(str(header.file_meta.TransferSyntaxUID))


def _decodes(syntax: UID) -> bool:
    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:
        return False


def to_hounsfield(file: DicomSlice, stored: np.ndarray, hu: np.ndarray, valid: np.ndarray) -> None:
    """Write one slice's Hounsfield units and validity in place; padding is found before the rescale.

    Args:
        file: the slice.
        stored: (rows, columns) stored integers.
        hu: (rows, columns) float32, overwritten.
        valid: (rows, columns) bool, overwritten.

    Raises:
        MissingRescale: slope or intercept is absent, or the units are not HU.
    """
    header = file.header
    slope, intercept = header_number(header, "RescaleSlope"), header_number(header, "RescaleIntercept")
    kind = header_text(header, "RescaleType").upper()
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
    value, limit = header_number(header, "PixelPaddingValue"), header_number(header, "PixelPaddingRangeLimit")
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


def header_text(header: Dataset, keyword: str) -> str:
    """A text element, at most 64 characters; empty when absent."""
    value = header.get(keyword)
    return " ".join(str(part) for part in _several(value)).strip()[:64]


def header_number(header: Dataset, keyword: str) -> float | None:
    """A numeric element; None when absent or no finite number."""
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
