"""Edited copies of one real slice: series of which one thing is odd, for the table of cases and the mutations."""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pydicom
import pydicom.data
from pydicom.dataset import Dataset
from pydicom.uid import UID, EnhancedCTImageStorage, ExplicitVRBigEndian

PYDICOM = Path(pydicom.data.__file__).parent
BASE = PYDICOM / "test_files" / "CT_small.dcm"
"""A slice of 128x128 from a GE scanner, which comes with pydicom."""
SPACING_MM = 5.0

Edit = Callable[[int, Dataset], object]
"""Changes a slice's data set, given its index."""
After = Callable[[Path], object]
"""Changes the folder once all slices are written."""


def stack(
    edit: Edit = lambda index, dataset: None,
    *,
    after: After = lambda folder: None,
    base: Path = BASE,
    count: int = 6,
) -> Callable[[Path], Path]:
    """Copies of one real slice, 5 mm apart, edited; named against their order in space."""

    def prepare(folder: Path) -> Path:
        for index in range(count):
            dataset = pydicom.dcmread(base)
            dataset.ImagePositionPatient = [-158.0, -179.0, -75.0 + SPACING_MM * index]
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.{index}")
            edit(index, dataset)
            dataset.save_as(folder / f"{count - index}.dcm")
        after(folder)
        return folder

    return prepare


def put(keyword: str, value: object, *, at: int | None = None) -> Edit:
    """Sets an element, in one slice or in all."""
    return lambda index, dataset: setattr(dataset, keyword, value) if at in (None, index) else None


def drop(keyword: str, *, at: int | None = None) -> Edit:
    """Removes an element, from one slice or from all."""
    return lambda index, dataset: delattr(dataset, keyword) if at in (None, index) else None


def move(*, x: float = 0.0, y: float = 0.0, z: float = 0.0, at: int) -> Edit:
    """Shifts one slice."""

    def edit(index: int, dataset: Dataset) -> None:
        if index == at:
            here = [float(value) for value in dataset.ImagePositionPatient]
            dataset.ImagePositionPatient = [a + b for a, b in zip(here, (x, y, z), strict=True)]

    return edit


def both(*edits: Edit) -> Edit:
    """Edits after one another."""
    return lambda index, dataset: [edit(index, dataset) for edit in edits]


def encode(syntax: str) -> Edit:
    """Compresses the pixels without loss."""
    return lambda index, dataset: dataset.compress(syntax, generate_instance_uid=False)


def turn(orientation: Sequence[float], direction: Sequence[float]) -> Edit:
    """Lays the stack along another direction."""

    def edit(index: int, dataset: Dataset) -> None:
        dataset.ImageOrientationPatient = list(orientation)
        dataset.ImagePositionPatient = [SPACING_MM * index * part for part in direction]

    return edit


def unlink(*names: str) -> After:
    """Removes files afterwards."""
    return lambda folder: [(folder / name).unlink() for name in names]


def rewrite(name: str, change: Callable[[bytes], bytes]) -> After:
    """Changes a file's bytes afterwards."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def copy(name: str, twin: str, edit: Edit = lambda index, dataset: None) -> After:
    """Puts an edited copy beside a file afterwards."""

    def after(folder: Path) -> None:
        dataset = pydicom.dcmread(folder / name)
        edit(0, dataset)
        dataset.save_as(folder / twin)

    return after


def add(amount: int, *, at: int | None = None) -> Edit:
    """Adds to the stored values, which are signed 16-bit integers."""

    def edit(index: int, dataset: Dataset) -> None:
        if at in (None, index):
            dataset.PixelData = (dataset.pixel_array + amount).astype("<i2").tobytes()

    return edit


def corner(value: int) -> Edit:
    """Stores one value in the first rows: 11 of 128, or 8 %."""

    def edit(index: int, dataset: Dataset) -> None:
        values = dataset.pixel_array.copy()
        values[:11] = value
        dataset.PixelData = values.astype("<i2").tobytes()

    return edit


def half_a_slice(index: int, dataset: Dataset) -> None:
    """The last slice has half the rows."""
    if index == 5:
        dataset.Rows, dataset.PixelData = 64, dataset.PixelData[: 64 * 128 * 2]


def as_unsigned(index: int, dataset: Dataset) -> None:
    """The same Hounsfield units, stored without sign."""
    dataset.PixelData = (dataset.pixel_array + 100).astype("<u2").tobytes()
    dataset.PixelRepresentation, dataset.RescaleIntercept = 0, float(dataset.RescaleIntercept) - 100


def enhanced(folder: Path, *, count: int = 5, syntax: str | None = None) -> Path:
    """The copies as the frames of one enhanced file, the last one first."""
    dataset = pydicom.dcmread(BASE)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    dataset.NumberOfFrames, dataset.PixelData = count, dataset.PixelData * count
    shared, frames = Dataset(), []
    shared.PlaneOrientationSequence = _item(ImageOrientationPatient=dataset.ImageOrientationPatient)
    shared.PixelMeasuresSequence = _item(PixelSpacing=dataset.PixelSpacing)
    for index in reversed(range(count)):
        frame = Dataset()
        frame.PlanePositionSequence = _item(ImagePositionPatient=[-158.0, -179.0, -75.0 + SPACING_MM * index])
        frame.PixelValueTransformationSequence = _item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")
        frame.FrameContentSequence = _item(StackID="1", InStackPositionNumber=index + 1)
        frames.append(frame)
    for keyword in (
        "ImageOrientationPatient",
        "ImagePositionPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        delattr(dataset, keyword)
    dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = [shared], frames
    if syntax is not None:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(folder / "1.dcm")
    return folder


def _item(**elements: object) -> list[Dataset]:
    """A sequence of one item."""
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return [item]


def two_series(folder: Path) -> Path:
    """The same slices as two series in one folder."""
    stack()(folder)
    for file in sorted(folder.iterdir()):
        copy(file.name, f"b{file.name}", put("SeriesInstanceUID", "1.2.3.4"))(folder)
    return folder


def twelve_bits_signed(index: int, dataset: Dataset) -> None:
    """Values down to -1200, in the low 12 bits, the four above them zero."""
    dataset.BitsStored, dataset.HighBit, dataset.RescaleIntercept = 12, 11, 304
    dataset.PixelData = ((dataset.pixel_array - 1328) & 0x0FFF).astype("<u2").tobytes()


def call_it(syntax: str) -> Edit:
    """Names another transfer syntax than the one that the pixels have."""
    return lambda index, dataset: setattr(dataset.file_meta, "TransferSyntaxUID", UID(syntax))


def without_preamble(content: bytes) -> bytes:
    """A bare data set, as archives of old wrote it."""
    return content[content.index(b"\x08\x00\x05\x00", 140) :]


def without_syntax(content: bytes) -> bytes:
    """The transfer syntax replaced by the UID of another thing."""
    return content.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.1\0\0\0", 1)


def private_syntax(content: bytes) -> bytes:
    """The transfer syntax replaced by one of a maker's own."""
    return content.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.113619.5.2\0\0", 1)


def big_endian(index: int, dataset: Dataset) -> None:
    """The retired encoding, which archives still hold."""
    values = dataset.pixel_array.astype(">i2").tobytes()
    for _ in dataset.iterall():  # elements are read before they are turned around
        pass
    dataset.PixelData, dataset.file_meta.TransferSyntaxUID = values, ExplicitVRBigEndian
    dataset.set_original_encoding(False, False, dataset.original_character_set)


def pad(low: int, high: int | None = None) -> Edit:
    """Declares stored values as padding."""

    def edit(index: int, dataset: Dataset) -> None:
        dataset.add_new("PixelPaddingValue", "SS", low)
        if high is not None:
            dataset.add_new("PixelPaddingRangeLimit", "SS", high)

    return edit


def under_an_overlay(index: int, dataset: Dataset) -> None:
    """12 bits stored, and an overlay of old in the bits above."""
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.PixelRepresentation, dataset.RescaleIntercept = 0, -1024
    dataset.PixelData = ((dataset.pixel_array & 0x0FFF) | 0x1000).astype("<u2").tobytes()


def one(path: Path) -> Callable[[Path], Path]:
    """A file as it is."""
    return lambda folder: path


def unpacked(path: Path) -> Callable[[Path], Path]:
    """An archive's files."""

    def prepare(folder: Path) -> Path:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
        return folder

    return prepare


def moved(path: Path) -> Callable[[Path], Path]:
    """Four copies whose position alone is rewritten, in the bytes: what cannot be saved again stays as it is."""

    def prepare(folder: Path) -> Path:
        content = path.read_bytes()
        tag = content.index(b"\x20\x00\x32\x00")
        explicit = content[tag + 4 : tag + 6] == b"DS"
        length = int.from_bytes(content[tag + 6 : tag + 8] if explicit else content[tag + 4 : tag + 8], "little")
        for index in range(4):
            position = f"0\\0\\{SPACING_MM * index:g}".ljust(length).encode()
            assert len(position) == length
            (folder / f"{index}.dcm").write_bytes(content[: tag + 8] + position + content[tag + 8 + length :])
        return folder

    return prepare
