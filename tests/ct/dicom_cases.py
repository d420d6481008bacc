"""The table of cases: file, expected, got; over edited copies of a real slice, pydicom's files and odd real ones.

`python tests/ct/dicom_cases.py` prints it, and ends with exit code 1 where a row is not as expected.
"""

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import dicom_edits as e
import numpy as np
from pydicom.uid import (
    MPEG2MPML,
    ComprehensiveSRStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    RTStructureSetStorage,
    SegmentationStorage,
)

from capsfl.ct.dicom import ReaderConfig, read_dicom
from capsfl.ct.errors import ScanError

SHARED = Path(os.environ.get("CAPSFL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
"""Real scans outside the repository, as the tests find them."""

Prepare = Callable[[Path], Path | Sequence[Path]]
"""Given an empty folder, what to read."""


@dataclass(frozen=True)
class Case:
    """One row: what is read, how, and what must come of it."""

    group: str
    name: str
    expected: str
    """The error's class, or `accepted` and the facts that the scan must have, in the words of `outcome`."""
    prepare: Prepare
    series: str | None = None
    config: ReaderConfig = field(default_factory=ReaderConfig)


def outcome(case: Case, folder: Path) -> str:
    """What the reader makes of a case, in a few words; anything but a scan or a named one-line error is a crash."""
    source = case.prepare(folder)
    try:
        scan = read_dicom(source, series=case.series, config=case.config)
    except ScanError as error:
        return f"{type(error).__name__}{'' if str(error).isprintable() else ' of several lines'}"
    assert np.isfinite(scan.hu).all()
    assert (scan.hu[~scan.valid] == -1000).all()
    z, y, x = scan.hu.shape
    facts = [f"accepted {z}x{y}x{x} at {scan.spacing_mm[0]:.3g} mm"]
    for count, name in (
        (scan.source.dropped_duplicates, "dropped"),
        (scan.source.interpolated_slices, "interpolated"),
        (round(scan.source.corrected_tilt_degrees), "degrees straightened"),
        (int(scan.source.burned_in_annotation), "burned-in annotation"),
        (int(100 * (~scan.valid).mean()), "% padding"),
    ):
        facts += [f"{count} {name}"] if count else []
    return ", ".join(facts)


WHOLE = "accepted 6x128x128 at 5 mm"
GAPS = ReaderConfig(allow_interpolation=True)
TILT = ReaderConfig(allow_tilt_correction=True)
TILTED = e.put("ImageOrientationPatient", [1, 0, 0, 0, 0.955336489, -0.295520207])
FIVE = e.unlink(*(f"{number}.dcm" for number in range(4, 9)))

EDITED: dict[str, list[tuple]] = {
    "mixed series": [
        ("one series", WHOLE, e.stack()),
        ("two series", "SeveralSeries", e.two_series),
        ("two, one chosen by its number", WHOLE, e.two_series, "2"),
        ("two, one chosen by the end of its UID", WHOLE, e.two_series, "2.3.4"),
        ("two, one chosen that is not there", "SeveralSeries", e.two_series, "7"),
        ("one slice of other pixel spacing", "InconsistentGeometry", e.stack(e.put("PixelSpacing", [1, 1], at=5))),
        ("one slice of another size", "InconsistentGeometry", e.stack(e.half_a_slice)),
    ],
    "no CT volume": [
        ("localizer", "NoSeries", e.stack(e.put("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]))),
        ("projection", "NoSeries", e.stack(e.put("ImageType", ["DERIVED", "SECONDARY", "MIP"]))),
        ("PET", "NoSeries", e.stack(e.put("Modality", "PT"))),
        ("segmentation", "NoSeries", e.stack(e.put("SOPClassUID", SegmentationStorage))),
        ("structure set", "NoSeries", e.stack(e.put("SOPClassUID", RTStructureSetStorage))),
        ("report", "NoSeries", e.stack(e.put("SOPClassUID", ComprehensiveSRStorage))),
        ("three slices", "TooFewSlices", e.stack(count=3)),
        ("one slice six times", "TooFewSlices", e.stack(e.put("ImagePositionPatient", [0, 0, 0]))),
    ],
    "order": [("names and numbers against the order in space", WHOLE, e.stack(e.put("InstanceNumber", 1)))],
    "spacing": [
        ("thickness that is not the spacing", WHOLE, e.stack(e.put("SliceThickness", 99))),
        ("position rounded by 0.8 %", WHOLE, e.stack(e.move(z=0.04, at=2))),
        ("position off by 4 %", "InconsistentGeometry", e.stack(e.move(z=0.2, at=2))),
        ("position absent", "InconsistentGeometry", e.stack(e.drop("ImagePositionPatient", at=3))),
        ("position beyond any table", "InconsistentGeometry", e.stack(e.move(z=1e9, at=3))),
        ("slice shifted aside", "InconsistentGeometry", e.stack(e.move(x=3, at=3))),
    ],
    "missing slices": [
        ("one", "MissingSlices", e.stack(after=e.unlink("3.dcm"))),
        ("one, to be filled", f"{WHOLE}, 1 interpolated", e.stack(after=e.unlink("3.dcm")), None, GAPS),
        ("five in a row, to be filled", "MissingSlices", e.stack(count=12, after=FIVE), None, GAPS),
    ],
    "duplicates": [
        ("the same slice twice", f"{WHOLE}, 1 dropped", e.stack(after=e.copy("3.dcm", "x.dcm"))),
        ("other pixels", "DuplicatePositions", e.stack(after=e.copy("3.dcm", "x.dcm", e.add(1)))),
        (
            "the same pixels, another rescale",
            "DuplicatePositions",
            e.stack(after=e.copy("3.dcm", "x.dcm", e.put("RescaleIntercept", -1000))),
        ),
    ],
    "gantry tilt": [
        ("20 degrees by the header, none by the positions", WHOLE, e.stack(e.put("GantryDetectorTilt", 20))),
        ("17 degrees by the positions", "GantryTilt", e.stack(TILTED)),
        (
            "17 degrees, to be straightened",
            "accepted 6x140x128 at 4.78 mm, 17 degrees straightened, 9 % padding",
            e.stack(TILTED),
            None,
            TILT,
        ),
    ],
    "orientation": [
        ("coronal", "accepted 128x6x128 at 0.661 mm", e.stack(e.turn((1, 0, 0, 0, 0, -1), (0, 1, 0)))),
        ("sagittal", "accepted 128x128x6 at 0.661 mm", e.stack(e.turn((0, 1, 0, 0, 0, -1), (1, 0, 0)))),
        (
            "45 degrees askew",
            "InconsistentGeometry",
            e.stack(e.turn((0.7071, 0.7071, 0, -0.7071, 0.7071, 0), (0, 0, 1))),
        ),
        (
            "one slice turned over",
            "InconsistentGeometry",
            e.stack(e.put("ImageOrientationPatient", [-1, 0, 0, 0, -1, 0], at=5)),
        ),
        (
            "directions not orthogonal",
            "InconsistentGeometry",
            e.stack(e.put("ImageOrientationPatient", [1, 0, 0, 1, 0, 0])),
        ),
    ],
    "rescale": [
        ("slice by slice", WHOLE, e.stack(e.both(e.add(7, at=2), e.put("RescaleIntercept", -1031, at=2)))),
        ("slope absent in one slice", "MissingRescale", e.stack(e.drop("RescaleSlope", at=2))),
        ("intercept absent", "MissingRescale", e.stack(e.drop("RescaleIntercept"))),
        ("optical density", "MissingRescale", e.stack(e.put("RescaleType", "OD"))),
        ("never applied, air at 128", "WrongFormat", e.stack(e.put("RescaleIntercept", 0))),
        ("slope of 1000", "CorruptFile", e.stack(e.put("RescaleSlope", 1000, at=2))),
    ],
    "stored values": [
        ("implicit types", WHOLE, e.stack(e.call_it(ImplicitVRLittleEndian))),
        ("big endian", WHOLE, e.stack(e.big_endian)),
        ("deflated", WHOLE, e.stack(e.call_it(DeflatedExplicitVRLittleEndian))),
        ("unsigned", WHOLE, e.stack(e.as_unsigned)),
        ("12 bits under an overlay", WHOLE, e.stack(e.under_an_overlay)),
        ("12 bits, negative", WHOLE, e.stack(e.twelve_bits_signed)),
        ("BitsStored against HighBit", "CorruptFile", e.stack(e.put("BitsStored", 9, at=2))),
        ("sign lost", "CorruptFile", e.stack(e.both(e.add(-2900), e.put("PixelRepresentation", 0)))),
    ],
    "padding": [
        ("a value", f"{WHOLE}, 8 % padding", e.stack(e.both(e.corner(136), e.pad(136)))),
        ("a range", f"{WHOLE}, 8 % padding", e.stack(e.both(e.corner(120), e.pad(100, 125)))),
        ("undeclared -2000", f"{WHOLE}, 8 % padding", e.stack(e.corner(-2000))),
    ],
    "colour": [
        ("MONOCHROME1", WHOLE, e.stack(e.put("PhotometricInterpretation", "MONOCHROME1"))),
        ("RGB", "UnsupportedColor", e.stack(e.put("PhotometricInterpretation", "RGB"))),
        ("palette", "UnsupportedColor", e.stack(e.put("PhotometricInterpretation", "PALETTE COLOR"))),
    ],
    "multi-frame": [
        ("enhanced, the last frame first", "accepted 5x128x128 at 5 mm", e.enhanced),
        ("frames in a file of a single-frame kind", "UnsupportedMultiframe", e.stack(e.put("NumberOfFrames", 2))),
        ("no functional groups", "UnsupportedMultiframe", e.stack(e.put("SOPClassUID", EnhancedCTImageStorage))),
    ],
    "compressed": [
        ("RLE", WHOLE, e.stack(e.encode(RLELossless))),
        ("JPEG 2000", WHOLE, e.stack(e.encode(JPEG2000Lossless))),
        ("by what nothing decodes", "MissingDecoder", e.stack(e.both(e.encode(RLELossless), e.call_it(MPEG2MPML)))),
        ("by a private encoding", "MissingDecoder", e.stack(after=e.rewrite("3.dcm", e.private_syntax))),
        ("by what is no encoding", "CorruptFile", e.stack(after=e.rewrite("3.dcm", e.without_syntax))),
        (
            "to a stream of another size",
            "CorruptFile",
            e.stack(e.both(e.encode(JPEG2000Lossless), e.put("Rows", 64), e.put("Columns", 256))),
        ),
    ],
    "privacy": [
        ("burned-in annotation", f"{WHOLE}, 1 burned-in annotation", e.stack(e.put("BurnedInAnnotation", "YES"))),
    ],
    "damage": [
        ("truncated in the pixels", "CorruptFile", e.stack(after=e.rewrite("3.dcm", lambda content: content[:-9000]))),
        ("truncated in the header", "CorruptFile", e.stack(after=e.rewrite("3.dcm", lambda content: content[:700]))),
        ("truncated at its start", "CorruptFile", e.stack(after=e.rewrite("3.dcm", lambda content: content[:150]))),
        ("zero bytes", "CorruptFile", e.stack(after=e.rewrite("3.dcm", lambda content: b""))),
        ("a text named .dcm", "NotDicom", e.stack(after=e.rewrite("3.dcm", lambda content: b"No scan.\n" * 99))),
        ("a text beside", WHOLE, e.stack(after=lambda folder: (folder / "a.txt").write_text("Notes."))),
        ("no preamble", WHOLE, e.stack(after=e.rewrite("3.dcm", e.without_preamble))),
        ("an empty folder", "NoSeries", e.stack(count=0)),
    ],
}

SINGLE = (
    "693_J2KI.dcm",
    "CT_small.dcm",
    "J2K_pixelrep_mismatch.dcm",
    "17106",
    "17136",
    "17166",
    "17196",
    "2062",
    "2392",
)
PYDICOM_EXPECTED = {
    **dict.fromkeys((*SINGLE, "2693", "3023", "3353"), "TooFewSlices"),
    # A CT header without pixels, and one that ends before it names a kind of object.
    **dict.fromkeys(("UN_sequence.dcm", "empty_charset_LEI.dcm"), "CorruptFile"),
    "no_meta.dcm": "NotDicom",  # a stray byte stands before the data set
}
"""What comes of pydicom's files one by one, where it is not NoSeries (other objects) or NotDicom (other files)."""
NOT_DICOM = {".txt", ".dump", ".gz", ".json", ".icc"}


def pydicom_cases() -> Iterator[Case]:
    """pydicom's own test files, each named alone; its folder of several patients; its CT slices as stacks."""
    files = e.PYDICOM / "test_files"
    for path in sorted(path for path in files.rglob("*") if path.is_file()):
        default = "NotDicom" if path.suffix in NOT_DICOM or path.name == "README" else "NoSeries"
        if path.name.startswith("IM0000"):
            default = "CorruptFile"  # CT headers, all without pixels
        expected = PYDICOM_EXPECTED.get(path.name, default)
        yield Case("pydicom", str(path.relative_to(files)), expected, e.one(path))
    patients = files / "dicomdirtests" / "98892001"
    yield Case("pydicom", patients.name, "accepted 5x16x16 at 2.5 mm", e.one(patients))
    yield Case("pydicom", "dicomdirtests", "SeveralSeries", e.one(patients.parent))
    for name, expected in {
        "693_J2KI.dcm": "accepted 4x512x512 at 5 mm, 21 % padding",
        "J2K_pixelrep_mismatch.dcm": "GantryTilt",
        "CT_small.dcm": "accepted 4x128x128 at 5 mm",
    }.items():
        yield Case("pydicom", f"{name}, stacked", expected, e.stack(base=files / name, count=4))

    mismatch = e.stack(e.put("ImageOrientationPatient", [1, 0, 0, 0, 1, 0]), base=files / SINGLE[2], count=4)
    yield Case("pydicom", f"{SINGLE[2]}, stacked upright", "accepted 4x512x512 at 5 mm, 21 % padding", mismatch)


def shared_cases() -> Iterator[Case]:
    """Real series and broken files of hospitals and collections; nothing where the folder is absent."""
    if not SHARED.is_dir():
        return
    siemens, ricord = SHARED / "lung-pet-ct-dx-siemens", SHARED / "ricord1a-covid-ct-jpegll"
    yield Case("real", siemens.name, "accepted 30x512x512 at 8 mm", e.one(siemens))
    yield Case("real", ricord.name, "accepted 62x512x512 at 5 mm, 21 % padding", e.one(ricord))
    tilted = SHARED / "ge-tilt-variable"
    yield Case("real", tilted.name, "GantryTilt", e.one(tilted))
    yield Case("real", f"{tilted.name}, to be straightened", "InconsistentGeometry", e.one(tilted), config=TILT)
    yield Case("real", "covid-ct", "NoSeries", e.one(SHARED / "covid-ct"))
    odd = SHARED / "odd-dicom"
    for path in sorted((odd / "wg04").iterdir()):
        yield Case("real", f"wg04/{path.name}", "TooFewSlices", e.one(path))
        expected = "accepted 4x512x512 at 5 mm, 21 % padding"
        yield Case("real", f"wg04/{path.name}, stacked", expected, e.stack(base=path, count=4))
    for path in sorted((odd / "misc").iterdir()):
        foreign = "localizer" in path.name or "seg" in path.name
        yield Case("real", f"misc/{path.name}", "NoSeries" if foreign else "TooFewSlices", e.one(path))
    for name, expected in {
        "cptac-pda-lungbases-01.dcm": "accepted 4x512x512 at 5 mm, 21 % padding",
        "lungct-diagnosis-R_004-1-01.dcm": "accepted 4x512x512 at 5 mm, 21 % padding",
        "lungmask-0.dcm": "accepted 4x512x512 at 5 mm, 21 % padding",
        "rtutils-phantom-ct_1.dcm": "accepted 4x512x512 at 5 mm, 21 % padding",
        "implicit-file-meta.dcm": "accepted 4x512x512 at 5 mm",
        "wrong-transfer-syntax.dcm": "CorruptFile",
    }.items():
        yield Case("real", f"misc/{name}, moved", expected, e.moved(odd / "misc" / name))
    duplicates = odd / "duplicate-positions" / "dupe-positions.zip"
    yield Case("real", "duplicate-positions", "InconsistentGeometry", e.unpacked(duplicates))


CASES = [
    *(
        Case(group, name, expected, prepare, *rest)
        for group, rows in EDITED.items()
        for name, expected, prepare, *rest in rows
    ),
    *pydicom_cases(),
    *shared_cases(),
]


def main() -> int:
    """Prints the table; a row that is not as expected makes the exit code 1."""
    from rich.console import Console
    from rich.table import Table

    logging.disable(logging.CRITICAL)  # what is left out by name stands in the log, and would stand between the rows
    table = Table("case", "file", "expected", "got")
    wrong = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in CASES:
            with tempfile.TemporaryDirectory() as folder:
                got = outcome(case, Path(folder))
            wrong += got != case.expected
            color = "green" if got == case.expected else "red"
            table.add_row(case.group, case.name, case.expected, f"[{color}]{got}[/]")
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    print(f"{len(CASES)} cases, {wrong} not as expected")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
