"""One file on disk: whether it is DICOM, whether it is CT, and which slices its header describes."""

import logging
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom.config import disable_value_validation
from pydicom.filereader import read_dataset
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLossless,
    JPEGLosslessSV1,
)

from capsfl.ct import errors, multiframe
from capsfl.ct.errors import ScanError
from capsfl.ct.plain_headers import UNDEFINED_LENGTH, WINDOW_BYTES, Memo, read_plain
from capsfl.ct.slices import DicomSlice, Header, PlainPixels, make_slice, number, read_facts, several

DICOM_SUFFIXES = {".dcm", ".dicom", ".dc3", ".ima"}
MAGIC = slice(128, 132)
FILE_GROUP = 0x0002
PIXEL_DATA = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")
BARE = (b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08")
"""A data set without a preamble starts with group 0002 or 0008, in either byte order."""
BARE_SYNTAXES = (ImplicitVRLittleEndian, ExplicitVRLittleEndian)
JPEG_SYNTAXES = (JPEGLossless, JPEGLosslessSV1)
STANDARD_UIDS = "1.2.840.10008."
REFORMATTED = {"MIP", "MINIP", "MPR", "REFORMATTED", "PROJECTION IMAGE", "VOLREN", "SCREEN SAVE"}
MOST_UNPACKED_BYTES = 1 << 30
"""Deflated data sets that unpack to more are refused, in bounded memory."""

READ = (
    *("SOPClassUID", "Modality", "ImageType", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("StudyInstanceUID", "SeriesInstanceUID", "PatientID", "BurnedInAnnotation"),
    *("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "Rows", "Columns", "SliceThickness"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "ExtendedOffsetTable"),
    *("Manufacturer", "ManufacturerModelName", "ConvolutionKernel", "KVP"),
    *multiframe.FUNCTIONAL,
)
"""All that is ever read beside the pixels; the identifiers among it leave only as a salted hash."""
READ_TAGS = [Tag(keyword) for keyword in READ]
WANTED = {int(tag): tag for tag in READ_TAGS}
KEYWORDS = dict(zip(map(int, READ_TAGS), READ, strict=True))


@dataclass(frozen=True)
class FileFinding:
    """What one file turned out to be: slices, or a reason to pass it by, or a fault."""

    path: Path
    slices: tuple[DicomSlice, ...] = ()
    skipped: str = ""
    """Why the file is no part of a CT volume; no tag value is quoted."""
    error: ScanError | None = None
    """Why a file that should be a CT slice cannot be used."""
    study: str = ""
    series: str = ""
    """UIDs of a faulty or skipped file whose header could be read that far."""


def examine_files(paths: Sequence[Path], *, named: bool) -> list[FileFinding]:
    """Read the headers of some files; nothing is raised, every fault is a finding.

    Args:
        paths: regular files.
        named: whether the user named these files themselves, so that "not DICOM" is a fault.
    """
    memo: Memo = {}
    with quiet_pydicom():
        return [_examine(path, memo, named=named) for path in paths]


@contextmanager
def quiet_pydicom() -> Iterator[None]:
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


def _examine(path: Path, memo: Memo, *, named: bool) -> FileFinding:
    header: Header | None = None
    try:
        header, skipped = _read_header(path, memo, named=named)
        if header is None or skipped:
            study, series = _uid(header, "Study"), _uid(header, "Series")
            return FileFinding(path, skipped=skipped, study=study, series=series)
        return FileFinding(path, slices=_slices(path, header))
    except ScanError as error:
        fault = error
    except OSError as error:
        fault = errors.Unreadable(path, f"cannot be read ({error.strerror or error})", "check its permissions")
    except Exception as error:  # a damaged header makes pydicom raise anything from struct.error on
        fault = errors.CorruptFile(path, f"the header is damaged ({type(error).__name__})", "copy it again")
    return FileFinding(path, error=fault, study=_uid(header, "Study"), series=_uid(header, "Series"))


def _uid(header: Header | None, kind: str) -> str:
    return "" if header is None else str(header.get(f"{kind}InstanceUID") or "")


def _read_header(path: Path, memo: Memo, *, named: bool) -> tuple[Header | None, str]:
    """The data set up to its pixels, and the reason why the file is no slice of a CT volume, if there is one."""
    if named and not path.is_file():  # a pipe would be waited for
        fault = "not a regular file" if path.exists() else "no such file"
        raise errors.Unreadable(path, fault, "check the path")
    suffix = path.suffix.lower()
    claims = named or suffix in DICOM_SUFFIXES
    with path.open("rb") as stream:
        head = stream.read(MAGIC.stop)
        if head[MAGIC] == b"DICM":
            head += stream.read(WINDOW_BYTES - len(head))
            header = _plain(head, memo)
            if header is None:
                _refuse_bomb(path, stream, MAGIC.stop)
                header = _parse(stream, force=False)
            if claims and header.sop_class is None and not header.get("Modality"):
                raise errors.CorruptFile(path, "the header ends before it says what the file is", "copy it again")
            return header, _reason_to_skip(header)
        if not head:
            if claims:
                raise errors.CorruptFile(path, "the file is empty", "copy it again from its source")
            return None, "empty file"
        # Old archives write bare data sets, which are DICOM all the same, under names without a suffix.
        if head[:2] in BARE and (claims or not suffix or suffix[1:].isdigit()):
            try:
                _refuse_bomb(path, stream, 0)
                header = _parse(stream, force=True)
                if str(header.get("SOPClassUID")).startswith(STANDARD_UIDS):
                    return header, _reason_to_skip(header)
            except errors.TooLarge:
                raise
            except Exception:  # any bytes at all arrive here, and the verdict is the same
                pass
    if claims:
        raise errors.NotDicom(path, "not a DICOM file", "remove it or copy it again from its source")
    return None, f"{suffix} file, not DICOM" if suffix else "not DICOM"


def _plain(head: bytes, memo: Memo) -> Header | None:
    """The header of a file that begins so, if it is plain."""
    plain = read_plain(head, WANTED, memo)
    if plain is None:
        return None
    values = {KEYWORDS[tag]: value for tag, value in plain.values.items()}
    sop_class = values.get("SOPClassUID") or plain.sop_class
    return _with_pixels(Header(values, sop_class, plain.syntax, (plain.implicit, True)), head, plain.end, 0)


def _parse(stream: BinaryIO, *, force: bool) -> Header:
    stream.seek(0)
    data = pydicom.dcmread(stream, stop_before_pixels=True, force=force, specific_tags=list(READ_TAGS))
    # Values are converted on first use, which fails here or never.
    values = {KEYWORDS[tag]: data[tag].value for tag in READ_TAGS if tag in data}
    own: Any = getattr(data, "file_meta", None) or {}
    sop_class = values.get("SOPClassUID") or own.get("MediaStorageSOPClassUID")
    implicit, little = data.original_encoding
    header = Header(values, sop_class, own.get("TransferSyntaxUID"), (bool(implicit), bool(little)))
    if header.named_syntax == DeflatedExplicitVRLittleEndian:
        return replace(header, pixel_bytes=-1, pixel_offset=stream.tell())
    start = stream.tell()
    return _with_pixels(header, stream.read(12), 0, start)


def _with_pixels(header: Header, held: bytes, at: int, start: int) -> Header:
    """Note where the pixels lie and their declared length; the parser has stopped in front of their element.

    Args:
        header: what stands in front of them.
        held: some bytes of the file.
        at: where in them the element begins.
        start: where in the file they begin.
    """
    implicit, little = header.encoding
    element = held[at : at + (8 if implicit else 12)]
    if len(element) < 8 or element[:4] not in PIXEL_DATA:
        return header
    length = int.from_bytes(element[-4:], "little" if little else "big")
    length = -1 if length == UNDEFINED_LENGTH else length
    return replace(header, pixel_bytes=length, pixel_element=element, pixel_offset=start + at + len(element))


def _refuse_bomb(path: Path, stream: BinaryIO, start: int) -> None:
    """Unpack a deflated data set into nothing, a piece at a time, and stop where no CT goes on.

    Whether it is deflated is what the parser will take it for: the file's own header is read as it reads it, from
    `start` to where another group begins, whatever length it declares.
    """
    stream.seek(start)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != FILE_GROUP)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    unpacker, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    piece = stream.read(1 << 16)
    while piece and not unpacker.eof:
        total += len(unpacker.decompress(piece, 1 << 20))
        if total > MOST_UNPACKED_BYTES:
            raise errors.TooLarge(
                path, f"unpacks to more than {MOST_UNPACKED_BYTES >> 20} MiB", "export it without deflation"
            )
        piece = unpacker.unconsumed_tail or stream.read(1 << 16)


def _reason_to_skip(header: Header) -> str:
    """Say why a data set is no slice of a CT volume; empty when it is one. No tag value is quoted."""
    sop_class = header.sop_class
    if sop_class is not None and sop_class not in (CTImageStorage, *multiframe.ENHANCED):
        # Only the standard's own names are quoted: a UID that it does not know may be anything.
        name = UID(str(sop_class)).name
        return f"{name}, not CT" if name != str(sop_class) else "not CT"
    modality = header.get("Modality")
    if modality not in (None, "", "CT") or (sop_class is None and modality != "CT"):
        return "not CT"
    kinds = {str(value).upper() for value in several(header.get("ImageType"))} | multiframe.frame_types(header)
    if "LOCALIZER" in kinds:
        return "localizer"
    if kinds & REFORMATTED or ("DERIVED" in kinds and not kinds & {"AXIAL", "VOLUME"}):
        return "derived image"
    return ""


def _slices(path: Path, header: Header) -> tuple[DicomSlice, ...]:
    if header.pixel_bytes is None:
        raise errors.CorruptFile(path, "truncated: it ends before its pixels", "copy it again from its source")
    color = str(header.get("PhotometricInterpretation", "MONOCHROME2"))
    if (number(header.get("SamplesPerPixel")) or 1) != 1 or not color.startswith("MONOCHROME"):
        raise errors.UnsupportedColor(
            path, "colour pixels, not Hounsfield units", "give the original CT slices, not screen captures"
        )
    if multiframe.is_multiframe(header):
        slices = multiframe.slices_of(path, header)
    else:
        one = make_slice(path, None, header, header.get, facts=read_facts(header, header.get), stack="")
        slices = (replace(one, plain=_plain_pixels(header, one)),)
    if not UID(slices[0].syntax).is_compressed:
        _check_size(path, header, slices)
    return slices


def _plain_pixels(header: Header, slice_: DicomSlice) -> PlainPixels | None:
    """Where the integers lie, if the header leaves no question: then the file is not parsed again for them."""
    stored, sign = number(header.get("BitsStored")), number(header.get("PixelRepresentation"))
    if (
        slice_.syntax not in (*BARE_SYNTAXES, *JPEG_SYNTAXES)
        or (slice_.syntax in JPEG_SYNTAXES) != (header.pixel_bytes == -1)
        or (slice_.syntax in JPEG_SYNTAXES and header.pixel_element[4:6] not in (b"OB", b"OW"))
        or header.get("ExtendedOffsetTable")
        or header.get("SamplesPerPixel") != 1
        or header.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2")
        or header.get("BitsAllocated") != 16
        or not (stored is not None and 1 <= stored <= 16)
        or sign not in (0, 1)
        or header.pixel_element[:4] != PIXEL_DATA[0]
    ):
        return None
    return PlainPixels(header.pixel_offset, header.pixel_element, signed=sign == 1, unused=16 - int(stored))


def _check_size(path: Path, header: Header, slices: tuple[DicomSlice, ...]) -> None:
    """Uncompressed pixels must fill the picture that the header declares, and the file must hold them all."""
    bits = number(header.get("BitsAllocated")) or 16
    row = slices[0].columns * bits / 8
    needed, declared = len(slices) * slices[0].rows * row, header.pixel_bytes
    assert declared is not None  # or `_slices` had refused it
    if declared < 0 and UID(slices[0].syntax).is_deflated:
        return
    # Writers pad to an even length and further; a whole row too many means that the header is wrong.
    if not needed <= declared < needed + max(row, 2):
        raise errors.CorruptFile(
            path, f"{declared} bytes of pixels, and the header describes {needed:.0f}", "export it again"
        )
    size = path.stat().st_size
    if size < declared:
        raise errors.CorruptFile(
            path, f"truncated: {size} bytes, and its pixels alone need {declared}", "copy it again from its source"
        )
