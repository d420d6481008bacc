"""Seeded damage to a small real series, and what may come of it: a named error, or a scan that its files justify."""

import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import dicom_edits as e
import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.filebase import DicomBytesIO
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from capsfl.ct.dicom import ReaderConfig, read_series, scan_folder
from capsfl.ct.errors import ScanError
from capsfl.ct.scan import Scan
from capsfl.ct.series import Series

Writer = Callable[[Path], object]
"""Writes an undamaged series of a few slices into a folder."""


def encoded(syntax: str) -> Writer:
    """Five slices under another transfer syntax."""

    def edit(index: int, dataset: pydicom.Dataset) -> None:
        if UID(syntax).is_encapsulated:
            dataset.compress(syntax, generate_instance_uid=False)
        else:
            dataset.file_meta.TransferSyntaxUID = UID(syntax)

    return e.stack(edit, count=5)


BASES: dict[str, Writer] = {
    "explicit": e.stack(count=5),
    "explicit again": e.stack(count=5),
    "implicit": encoded(ImplicitVRLittleEndian),
    "deflated": encoded(DeflatedExplicitVRLittleEndian),
    "RLE": encoded(RLELossless),
    "JPEG 2000": encoded(JPEG2000Lossless),
    "JPEG-LS": encoded(JPEGLSLossless),
    "enhanced": e.enhanced,
    "enhanced RLE": lambda folder: e.enhanced(folder, syntax=RLELossless),
}
"""The series that are damaged, in turn."""

KEYWORDS = (
    *("SOPClassUID", "Modality", "ImageType", "SamplesPerPixel", "PhotometricInterpretation", "PixelData"),
    *("StudyInstanceUID", "SeriesInstanceUID", "PatientID", "Manufacturer", "ConvolutionKernel", "SliceThickness"),
    *("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "Rows", "Columns"),
    *("RescaleSlope", "RescaleIntercept", "PixelPaddingValue", "BitsAllocated", "BitsStored", "HighBit"),
    "PixelRepresentation",
)
TYPES = (b"DS", b"IS", b"US", b"SS", b"UI", b"LO", b"PN", b"SQ", b"OB", b"UN", b"FD", b"AT", b"??")
VALUES = (
    *(b"", b" ", b"0", b"-1", b"1e999", b"nan", b"1\\2\\3\\4\\5\\6\\7", b"\\\\\\", b"1e-30", b"65535"),
    *(b"\x00" * 8, b"\xff" * 8, b"\n\x1b[31m", b"DERIVED\\MPR", b"1.2.840.10008.5.1.4.1.1.4", b"x" * 70_000),
)
SCALES = np.array([1.0, 1.0, 1.0, 0.999, 1.02, -1.0, 2.0, 1e6])


def mutate(folder: Path, seed: int, strange: list[Path]) -> str:
    """Damages the series in one way and says which; `strange` are files that may take a slice's place."""
    draw = random.Random(seed)
    files = sorted(folder.iterdir())
    kind = draw.choice(("bytes", "bytes", "element", "element", "element", "numbers", "file"))
    if kind == "file":
        return _mutate_file(draw, files, strange)
    change = {"bytes": _flip, "element": _damage_element, "numbers": _damage_numbers}[kind]
    chosen = files if draw.random() < 0.3 else [draw.choice(files)]
    state = draw.getrandbits(32)
    for file in chosen:  # the same damage to each
        file.write_bytes(change(random.Random(state), file.read_bytes()))
    return f"{kind} of {len(chosen)}"


def _mutate_file(draw: random.Random, files: list[Path], strange: list[Path]) -> str:
    file = draw.choice(files)
    content = file.read_bytes()
    what = draw.choice(("cut", "grow", "remove", "twin", "replace", "swap", "empty", "hole"))
    match what:
        case "cut":
            file.write_bytes(content[: draw.randrange(len(content))])
        case "grow":
            file.write_bytes(content + draw.randbytes(draw.choice((1, 100, 40_000))))
        case "remove":
            file.unlink()
        case "twin":
            shutil.copy(file, file.with_name("twin.dcm"))
        case "replace":
            file.write_bytes(draw.choice(strange).read_bytes())
        case "swap":
            other = draw.choice(files)
            file.write_bytes(other.read_bytes())
            other.write_bytes(content)
        case "empty":
            file.write_bytes(b"")
        case "hole":
            start = draw.randrange(len(content))
            end = start + draw.choice((16, 512, 8192))
            file.write_bytes(content[:start] + bytes(len(content[start:end])) + content[end:])
    return what


def damage_header(draw: random.Random, content: bytes) -> bytes:
    """Damages one file: single bytes of it, or one element of its header."""
    return draw.choice((_flip, _damage_element))(draw, content)


def _flip(draw: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        # The header is a twentieth of the file, and most of what can go wrong.
        end = min(3000, len(content)) if draw.random() < 0.7 else len(content)
        changed[draw.randrange(128, end)] = draw.randrange(256)
    return bytes(changed)


def _damage_element(draw: random.Random, content: bytes) -> bytes:
    """Removes, doubles, retypes, empties, replaces or blows up one element, where the file is explicit."""
    keyword = draw.choice(KEYWORDS)
    tag = tag_for_keyword(keyword)
    assert tag is not None
    start = content.find((tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little"), 132)
    if start < 0 or not content[start + 4 : start + 6].isalpha():
        return _flip(draw, content)
    long = content[start + 4 : start + 6] in (b"OB", b"OW", b"SQ", b"UN")
    at, size = (start + 8, 4) if long else (start + 6, 2)
    end = at + size + int.from_bytes(content[at : at + size], "little")
    before, element, after = content[:start], content[start:end], content[end:]
    head = element[: at - start]
    match draw.choice(("remove", "double", "retype", "value", "value", "length", "move")):
        case "remove":
            return before + after
        case "double":
            return before + element + element + after
        case "move":
            return before[:-200] + element + before[-200:] + after
        case "retype":
            return before + element[:4] + draw.choice(TYPES) + element[6:] + after
        case "length":
            length = draw.choice((0, 1, 7, 255, 65535) if size == 2 else (0, 1, 16384, 2**31, 2**32 - 1))
            return before + head + length.to_bytes(size, "little") + element[len(head) + size :] + after
        case _:
            value = draw.choice(VALUES)
            length = min(len(value), 2 ** (8 * size) - 2)
            return before + head + length.to_bytes(size, "little") + value + after


def _damage_numbers(draw: random.Random, content: bytes) -> bytes:
    """Changes a number of the geometry or the rescale as a wrong but well-formed export would."""
    keyword = draw.choice(("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(DicomBytesIO(content))
        owners = [dataset, *(item for sequence in _groups(dataset) for item in sequence)]
        owner = draw.choice([owner for owner in owners if keyword in owner])
        values = np.atleast_1d(np.array(owner[keyword].value, float))
        at = draw.randrange(len(values))
        values[at] = values[at] * draw.choice(SCALES.tolist()) + draw.choice((0.0, 0.0, 0.01, 1.0))
        setattr(owner, keyword, [f"{value:.10g}"[:16] for value in values] if len(values) > 1 else f"{values[0]:g}")
        stream = DicomBytesIO()
        dataset.save_as(stream)
    return stream.getvalue()


def _groups(dataset: pydicom.Dataset) -> Iterator[pydicom.Sequence]:
    """The sequences within the functional groups, if there are any."""
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in dataset.get(keyword, []):
            yield from (element.value for element in group)


def verdict(folder: Path) -> str:
    """Reads a damaged series: the error's name, or `accepted` once the files have been found to justify the scan.

    Any other exception is the reader's fault, and so is an AssertionError: it took what the files do not say.
    """
    try:
        listing = scan_folder(folder, config=ReaderConfig(), processes=1)
        named = {path for path, _ in (*listing.skipped, *listing.broken)}
        named = named.union(*(one.files for one in listing.series))
        assert named == set(folder.iterdir()), "a file is not accounted for"
        for one in listing.series:
            if one.refusal is not None and len(one.slices) >= 4:
                raise one.refusal
        for _, error in listing.broken:
            raise error
        if len(listing.accepted) != 1:
            return f"{len(listing.accepted)} accepted"
        series = listing.accepted[0]
        scan = read_series(series)
    except ScanError as error:
        return f"{type(error).__name__}{'' if str(error).isprintable() else ' of several lines'}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        justify(scan, series)
    return "accepted"


def justify(scan: Scan, series: Series) -> None:
    """Compares every pixel with what pydicom alone makes of the files, at the place that they name."""
    backwards = np.linalg.inv(scan.affine)
    assert scan.hu.shape[0] * scan.hu.shape[1] * scan.hu.shape[2] == (
        (len(series.slices) - scan.source.dropped_duplicates) * series.rows * series.columns
    )
    for file in series.files:
        dataset = pydicom.dcmread(file, force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:
            dataset.file_meta.TransferSyntaxUID = UID(series.slices[0].syntax)
        for value, stored in _frames(dataset):
            hu = stored * float(value("RescaleSlope")) + float(value("RescaleIntercept"))
            directions = np.array(value("ImageOrientationPatient"), float)
            row_mm, column_mm = (float(spacing) for spacing in value("PixelSpacing"))
            row, column = np.mgrid[: hu.shape[0], : hu.shape[1]]
            points = np.array(value("ImagePositionPatient"), float)[:, None, None]
            points = (
                points + directions[:3, None, None] * column * column_mm + directions[3:, None, None] * row * row_mm
            )
            places = np.einsum("ij,jrc->irc", backwards[:3, :3], points) + backwards[:3, 3][:, None, None]
            index = np.rint(places).astype(int)
            assert np.abs(places - index).max() < 0.3, "the scan lies beside its files"
            got, valid = scan.hu[tuple(index)], scan.valid[tuple(index)]
            np.testing.assert_allclose(got[valid], hu[valid], rtol=1e-5, atol=0.01)
            np.testing.assert_array_equal(valid, ~((hu < -1500) | _declared_padding(dataset, stored)))


def _frames(dataset: pydicom.Dataset) -> Iterator[tuple[Callable[[str], Any], np.ndarray]]:
    """For each frame how to look an element up, and the stored values."""
    stored = np.atleast_3d(dataset.pixel_array.astype(np.float64).T).T
    groups = dataset.get("PerFrameFunctionalGroupsSequence")
    if not groups:
        yield dataset.get, stored[0]
        return
    shared = dataset.SharedFunctionalGroupsSequence[0]
    for group, values in zip(groups, stored, strict=True):
        found: dict[str, Any] = {}
        for owner in (shared, group):  # the frame's own values over the shared ones
            for sequence in owner:
                found |= {element.keyword: element.value for element in sequence.value[0]}
        yield lambda keyword, found=found: found.get(keyword, dataset.get(keyword)), values


def _declared_padding(dataset: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    """Where stored values are declared to be padding, in either sign: writers store -2000 as 63536 and back."""
    padding = np.zeros(stored.shape, bool)
    if dataset.get("PixelPaddingValue") in (None, "", b""):
        return padding
    first = float(dataset.PixelPaddingValue)
    last = float(dataset.get("PixelPaddingRangeLimit") or first)
    for shift in (-(2.0**dataset.BitsAllocated), 0.0, 2.0**dataset.BitsAllocated):
        padding |= (stored >= min(first, last) + shift) & (stored <= max(first, last) + shift)
    return padding


def strange_files() -> list[Path]:
    """Files that may take a slice's place: other objects and broken ones."""
    files = e.PYDICOM / "test_files"
    return sorted(path for path in files.glob("*") if path.is_file() and path.stat().st_size < 100_000)


def run(
    seeds: range,
    place: Path,
    *,
    bases: Mapping[str, Writer] = BASES,
    report: Callable[[int, str, str], None] = lambda seed, what, came: None,
) -> None:
    """Damages and reads once per seed; raises what the reader must not raise, with the seed."""
    strange = strange_files()
    names = list(bases)
    for name, write in bases.items():
        (place / name).mkdir(parents=True)
        write(place / name)
        assert verdict(place / name) == "accepted"
    for seed in seeds:
        name, folder = names[seed % len(names)], place / "damaged"
        shutil.copytree(place / name, folder)
        what = mutate(folder, seed, strange)
        try:
            came = verdict(folder)
        except Exception as error:
            os.rename(folder, place / f"seed-{seed}")
            error.add_note(f"seed {seed} ({name}, {what}), kept in {place / f'seed-{seed}'}")
            raise
        report(seed, f"{name}, {what}", came)
        shutil.rmtree(folder)
