"""One CT slice as its header describes it: where it lies, how its values become Hounsfield units."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.pixels import get_decoder  # pyright: ignore[reportPrivateImportUsage]
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from capsfl.ct import errors
from capsfl.ct.errors import printable

HOUNSFIELD_TYPES = {"", "HU", "HU_MOD", "US"}  # US is "unspecified", which anonymisers write
NOBODY = {
    *("anon", "anonym", "anonyme", "anonymous", "anonymized", "anonymised", "deidentified", "pseudonymized", "removed"),
    *("redacted", "unknown", "none", "null", "nil", "na", "notavailable", "blank", "empty", "patient", "patientid"),
    *("default", "dummy", "unnamed", "noname", "noid", "id"),
}
"""What anonymisers write for everybody's PatientID, in small letters and digits alone."""
UNDEFINED_LENGTH = b"\xff\xff\xff\xff"
FARTHEST_MM = 1e5
"""No scanner's table travels so far: a position beyond it is damaged, and would need a grid beyond any memory."""


@dataclass(frozen=True)
class Header:
    """What was read of a file in front of its pixels."""

    values: Mapping[str, Any] = field(repr=False)
    """Converted values by keyword, of the elements that are there and were asked for."""
    sop_class: object
    """The kind of object, by the data set or else by the file's own header."""
    named_syntax: object
    """The transfer syntax that the file's own header names; None where it names none."""
    encoding: tuple[bool, bool]
    """Whether it was parsed as implicit, and as little endian."""
    pixel_bytes: int | None = None
    """Declared length of the pixels; None where the file was cut off before them, negative where it cannot be known
    yet: compressed pixels tell only when they are decoded."""
    pixel_element: bytes = b""
    """The bytes that declare it."""
    pixel_offset: int = 0
    """Where the pixels begin, right behind."""

    def get(self, keyword: str, default: object = None) -> Any:
        """A value by its keyword."""
        return self.values.get(keyword, default)


@dataclass(frozen=True)
class SliceFacts:
    """What an allow-listed header says about the scanner; one object serves all frames of a file."""

    manufacturer: str = ""
    model: str = ""
    kernel: str = ""
    slice_thickness_mm: float | None = None
    tube_voltage_kv: float | None = None
    burned_in_annotation: bool = False

    @property
    def scanner(self) -> str:
        """Manufacturer and model; empty where neither is known."""
        return " ".join(dict.fromkeys(part for part in (self.manufacturer, self.model) if part))


@dataclass(frozen=True)
class PlainPixels:
    """Where in its file a slice's 16-bit integers lie: bare, low byte first, one row after the other, or compressed."""

    offset: int
    """Bytes in front of them."""
    element: bytes
    """Tag, type and length of their element: the bytes right in front of them."""
    signed: bool
    unused: int
    """Bits at the top that hold no part of the number: nothing, its sign, or an overlay."""

    @property
    def jpeg(self) -> bool:
        """Whether they are one stream of JPEG Lossless, in fragments."""
        return self.element.endswith(UNDEFINED_LENGTH)


@dataclass(frozen=True)
class DicomSlice:
    """A single-frame file, or one frame of a multi-frame file; its pixels are still on disk."""

    path: Path
    frame: int | None
    """Index within a multi-frame file; None for a single-frame file."""
    study: str = field(repr=False)
    series: str = field(repr=False)
    patient: str = field(repr=False)
    """Identity that pseudonyms are made of; it leaves the reader only as a salted hash. The PatientID, or the study
    where that is absent or stands for nobody; empty where there is neither."""
    stack: str
    """Stack and temporal position within an enhanced series; empty for a single-frame file."""
    orientation: tuple[float, float, float, float, float, float]
    """Direction cosines along a row, then along a column."""
    position: tuple[float, float, float]
    """LPS mm of the first pixel."""
    pixel_spacing: tuple[float, float]
    """mm between rows, between columns."""
    rows: int
    columns: int
    slope: float
    intercept: float
    padding: tuple[float, float] | None
    """Lowest and highest stored value that means "no measurement", as declared."""
    syntax: str
    """Transfer syntax UID: how the pixels are encoded."""
    facts: SliceFacts
    patient_known: bool = True
    """Whether `patient` is a PatientID."""
    plain: PlainPixels | None = None
    """None where a decoder has to be asked."""

    @property
    def name(self) -> str:
        """File name for messages, with the frame's number from 1."""
        return self.path.name if self.frame is None else f"{self.path.name} frame {self.frame + 1}"


def make_slice(
    path: Path, frame: int | None, header: Header, value: Callable[[str], object], *, facts: SliceFacts, stack: str
) -> DicomSlice:
    """Take a slice's place in space and its rescale from a header.

    Args:
        path: the file.
        frame: index within a multi-frame file, or None.
        header: the file's data set.
        value: an element's value by keyword; for a frame it comes from the functional groups.
        facts: scanner facts.
        stack: see `DicomSlice.stack`.

    Raises:
        InconsistentGeometry: position, orientation or pixel spacing is absent or makes no sense.
        MissingRescale: slope or intercept is absent, or the units are not HU.
        MissingDecoder: compressed, and no installed package decodes it.
        CorruptFile: the encoding is none, or the description of the pixels contradicts itself.
    """
    orientation, position, spacing, rows, columns = _geometry(path, header, value)
    slope, intercept = _rescale(path, value)
    bits_stored, high_bit = number(header.get("BitsStored")), number(header.get("HighBit"))
    if bits_stored is not None and high_bit is not None and high_bit != bits_stored - 1:
        raise errors.CorruptFile(
            path, f"BitsStored {bits_stored:g} and HighBit {high_bit:g} contradict each other", "export it again"
        )
    patient = str(header.get("PatientID") or "")
    known = not stands_for_nobody(patient)
    return DicomSlice(
        path=path,
        frame=frame,
        study=str(header.get("StudyInstanceUID") or ""),
        # Without a series UID the folder is all that holds a series together.
        series=str(header.get("SeriesInstanceUID") or "") or f"folder {path.parent}",
        patient=patient if known else str(header.get("StudyInstanceUID") or ""),
        stack=stack,
        orientation=orientation,
        position=position,
        pixel_spacing=spacing,
        rows=rows,
        columns=columns,
        slope=slope,
        intercept=intercept,
        padding=_padding(path, header),
        syntax=_syntax(path, header),
        facts=facts,
        patient_known=known,
    )


def stands_for_nobody(patient: str) -> bool:
    """Whether a PatientID is blank, or what anonymisers write for everybody: `ANON`, `Unknown`, `0000`, `XXX`.

    To take it for a person would pool all who have it.
    """
    plain = "".join(sign for sign in patient.lower() if sign.isalnum())
    return plain in NOBODY or not plain.strip("0") or not plain.strip("x")


def _geometry(
    path: Path, header: Header, value: Callable[[str], object]
) -> tuple[tuple[float, float, float, float, float, float], tuple[float, float, float], tuple[float, float], int, int]:
    try:
        across_x, across_y, across_z, down_x, down_y, down_z = map(float, several(value("ImageOrientationPatient")))
        x, y, z = map(float, several(value("ImagePositionPatient")))
        row_spacing, column_spacing = map(float, several(value("PixelSpacing")))
        rows, columns = int(header.get("Rows")), int(header.get("Columns"))
    except (TypeError, ValueError):
        raise errors.InconsistentGeometry(
            path, "position, orientation or pixel spacing is absent or no number", "export it again"
        ) from None
    along_row, along_column = np.array([across_x, across_y, across_z]), np.array([down_x, down_y, down_z])
    unit = np.array([along_row @ along_row, along_column @ along_column])
    # Written so that a value that is no number fails the comparison.
    if not (np.abs(unit - 1).max() <= 1e-3 and abs(along_row @ along_column) <= 1e-3):
        raise errors.InconsistentGeometry(
            path, "the orientation's two directions are not orthogonal unit vectors", "export it again"
        )
    if not max(abs(x), abs(y), abs(z)) <= FARTHEST_MM:
        raise errors.InconsistentGeometry(path, f"the slice lies at {x:g}, {y:g}, {z:g} mm", "export it again")
    if not (0 < row_spacing < np.inf and 0 < column_spacing < np.inf):
        raise errors.InconsistentGeometry(
            path, f"pixel spacing {row_spacing:g} x {column_spacing:g} mm", "export the series again"
        )
    if rows < 1 or columns < 1:
        raise errors.InconsistentGeometry(path, f"{rows} rows and {columns} columns", "export the series again")
    orientation = (across_x, across_y, across_z, down_x, down_y, down_z)
    return orientation, (x, y, z), (row_spacing, column_spacing), rows, columns


def _rescale(path: Path, value: Callable[[str], object]) -> tuple[float, float]:
    slope, intercept = number(value("RescaleSlope")), number(value("RescaleIntercept"))
    fault = "no usable RescaleSlope and RescaleIntercept"
    if text(value("RescaleType")).upper() not in HOUNSFIELD_TYPES:
        fault, slope = "RescaleType is not HU", None
    if not slope or intercept is None:
        raise errors.MissingRescale(path, fault, "Hounsfield units are never guessed: export it again")
    return slope, intercept


def _padding(path: Path, header: Header) -> tuple[float, float] | None:
    ends: list[float] = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        value = header.get(keyword)
        if value is None or value == "" or value == []:
            continue
        end = number(value)
        if end is None:
            raise errors.CorruptFile(path, f"{keyword} is no number", "export it again")
        ends.append(end)
    if not ends or header.get("PixelPaddingValue") is None:
        return None
    return ends[0], ends[-1]


def _syntax(path: Path, header: Header) -> str:
    """The encoding the file names, or the one it was parsed with if it names none."""
    if header.named_syntax is None:
        implicit, little = header.encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        return str(ImplicitVRLittleEndian if implicit else explicit)
    syntax = UID(str(header.named_syntax))
    if syntax.is_private:
        raise errors.MissingDecoder(path, "encoded by a private transfer syntax", "export it uncompressed")
    if not syntax.is_transfer_syntax:
        raise errors.CorruptFile(path, "its transfer syntax is none", "copy or export the slice again")
    if syntax.is_compressed and not syntax.is_deflated:
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:
            raise errors.MissingDecoder(path, f"compressed as {syntax.name}", "export it uncompressed") from None
        if not available:
            raise errors.MissingDecoder(
                path, f"compressed as {syntax.name}", "decode it with: pip install 'capsfl[dicom]'"
            )
    return str(syntax)


def read_facts(header: Header, value: Callable[[str], object]) -> SliceFacts:
    """The scanner facts of a header; anything that is no fact there stays empty."""
    return SliceFacts(
        manufacturer=text(header.get("Manufacturer")),
        model=text(header.get("ManufacturerModelName")),
        kernel=text(value("ConvolutionKernel")),
        slice_thickness_mm=number(value("SliceThickness")),
        tube_voltage_kv=number(value("KVP")),
        burned_in_annotation=text(header.get("BurnedInAnnotation")).upper() == "YES",
    )


def text(value: object) -> str:
    """An element's value as one printable line of at most 64 characters; empty when absent."""
    return printable(" ".join(str(part) for part in several(value)).strip()[:64])


def number(value: object) -> float | None:
    """An element's value as a finite number; None when absent, several or none."""
    try:
        result = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return None
    return result if np.isfinite(result) else None


def several(value: object) -> list:
    """An element's values as a list; empty when absent."""
    if value is None:
        return []
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
