"""Stored pixels to Hounsfield units: decoding, rescale and padding, one slice in memory at a time."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.pixels import iter_pixels, pixel_array  # pyright: ignore[reportPrivateImportUsage]
from pydicom.uid import UID

from capsfl.ct import errors
from capsfl.ct.codestreams import Picture, declared_picture
from capsfl.ct.errors import printable
from capsfl.ct.jpeg_lossless import decode_lossless, only_frame
from capsfl.ct.scan import AIR_HU, PADDING_HU
from capsfl.ct.slices import DicomSlice, PlainPixels

SAMPLE_BITS = (None, *range(2, 17))
HIGHEST_HU = 32768.0
"""Extended scales end at 30710 HU: beyond it the header misreads the stored values."""

DESCRIPTION = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData"),
)


def decode(slices: Sequence[DicomSlice]) -> Iterator[tuple[int, np.ndarray]]:
    """Decode slices to their stored integers, opening each file once.

    Yields:
        Each slice's index in `slices` and its (rows, columns) array; files in the order of their first
        slice, the frames of a file in the order in which it holds them.

    Raises:
        CorruptFile: truncated, or the pixels contradict the header.
    """
    first = {file.path: index for index, file in reversed(list(enumerate(slices)))}
    indices = sorted(range(len(slices)), key=lambda index: (first[slices[index].path], slices[index].frame or 0))
    for path, group in groupby(indices, key=lambda index: slices[index].path):
        wanted = list(group)
        try:
            for index, stored in zip(wanted, _frames(path, [slices[index] for index in wanted]), strict=True):
                shape = (slices[index].rows, slices[index].columns)
                if stored.shape != shape:
                    raise errors.CorruptFile(
                        path, f"pixels of shape {stored.shape}, header says {shape}", "export it again"
                    )
                yield index, stored
        except (errors.ScanError, GeneratorExit):
            raise
        except Exception as error:  # decoders are third-party code: whatever they raise, the file is at fault
            raise errors.CorruptFile(
                path, f"the pixels do not decode ({_line(error)})", "copy or export the slice again"
            ) from error


def _frames(path: Path, slices: list[DicomSlice]) -> Iterator[np.ndarray]:
    if slices[0].plain is not None:
        stored = (_jpeg if slices[0].plain.jpeg else _plain)(path, slices[0], slices[0].plain)
        if stored is not None:
            yield stored
            return
    syntax = UID(slices[0].syntax)
    if slices[0].frame is not None and not syntax.is_compressed:
        # Native frames are read one by one: a whole multi-frame file may be as large as its volume.
        yield from iter_pixels(path, indices=[file.frame or 0 for file in slices], raw=True)
        return
    dataset = pydicom.dcmread(path, force=True, specific_tags=list(DESCRIPTION))
    if not isinstance(getattr(dataset, "file_meta", None), FileMetaDataset):
        dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    if syntax.is_encapsulated:
        _check_codestreams(path, dataset, slices)
    if slices[0].frame is None:
        yield pixel_array(dataset, raw=True)
    else:
        yield from iter_pixels(dataset, indices=[file.frame or 0 for file in slices], raw=True)


def _plain(path: Path, file: DicomSlice, plain: PlainPixels) -> np.ndarray:
    """The integers from where the header's reader left them."""
    size = 2 * file.rows * file.columns
    found = _from_element(path, plain, size)
    if len(found) != len(plain.element) + size:
        raise errors.CorruptFile(path, "changed since its header was read", "copy it again from its source")
    stored = np.frombuffer(found, "<i2" if plain.signed else "<u2", offset=len(plain.element))
    if plain.unused:
        stored = (stored << plain.unused) >> plain.unused
    return stored.reshape(file.rows, file.columns)


def _jpeg(path: Path, file: DicomSlice, plain: PlainPixels) -> np.ndarray | None:
    """The integers of a JPEG Lossless stream by the faster decoder; None where the general way has to be gone."""
    frame = only_frame(_from_element(path, plain), len(plain.element))
    picture = declared_picture(frame) if frame else None
    # Where the header calls some of the stream's bits unused, what the decoders make of them is not looked into here.
    if frame is None or picture is None or picture.bits != 16 - plain.unused or (plain.signed and plain.unused):
        return None
    _check_picture(path, picture, file)
    stored = decode_lossless(frame)
    return stored if stored is None or not plain.signed else stored.view(np.int16)


def _from_element(path: Path, plain: PlainPixels, size: int = -1) -> bytes:
    """The pixels' element as the header's reader found it, with `size` bytes of what follows, or all."""
    with path.open("rb") as stream:
        stream.seek(plain.offset - len(plain.element))
        found = stream.read(size if size < 0 else len(plain.element) + size)
    if not found.startswith(plain.element):
        raise errors.CorruptFile(path, "changed since its header was read", "copy it again from its source")
    return found


def _check_codestreams(path: Path, dataset: Dataset, slices: list[DicomSlice]) -> None:
    """A decoder allocates what the compressed stream asks for, so that must be what the header says."""
    count = int(dataset.get("NumberOfFrames") or 1)
    offsets = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    table = (offsets[0], offsets[1]) if offsets[0] and offsets[1] else None
    for frame in generate_frames(dataset.PixelData, number_of_frames=count, extended_offsets=table):
        _check_picture(path, declared_picture(frame), slices[0])


def _check_picture(path: Path, picture: Picture | None, file: DicomSlice) -> None:
    if picture is None:
        return
    fault = ""
    if (picture.rows, picture.columns) != (file.rows, file.columns):
        fault = f"compressed pixels of {picture.rows}x{picture.columns}, header says {file.rows}x{file.columns}"
    elif picture.components not in (None, 1) or picture.bits not in SAMPLE_BITS:  # GDCM would end the process
        fault = f"compressed pixels of {picture.components} samples of {picture.bits} bits, not one of 2 to 16"
    if fault:
        raise errors.CorruptFile(path, fault, "export it again")


def to_hounsfield(file: DicomSlice, stored: np.ndarray, hu: np.ndarray, valid: np.ndarray) -> float:
    """Write one slice's Hounsfield units and validity in place; padding is found on the stored values.

    Args:
        file: the slice.
        stored: (rows, columns) stored integers.
        hu: (rows, columns) float32, overwritten; -1000 where padded.
        valid: (rows, columns) bool, overwritten.

    Returns:
        The lowest valid HU; infinite when all is padding.

    Raises:
        CorruptFile: values beyond what any scanner gives.
    """
    low, high = int(stored.min()), int(stored.max())
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged rescale overflows, and is refused below
        np.multiply(stored, np.float32(file.slope), out=hu, casting="unsafe")
        hu += np.float32(file.intercept)
    ends = sorted(file.slope * value + file.intercept for value in (low, high))
    padding = None
    if file.padding is not None:
        first, last = _padding_range(file.padding, stored.dtype)
        if first <= high and last >= low:
            padding = stored == first if first == last else (stored >= first) & (stored <= last)
    if ends[0] < PADDING_HU:
        below = hu < PADDING_HU
        padding = below if padding is None else padding | below
    if padding is None:
        valid[...] = True
        lowest, highest = ends
    else:
        np.logical_not(padding, out=valid)
        np.copyto(hu, np.inf, where=padding)
        lowest = float(hu.min())  # a tenth of the time that a minimum with `where` takes
        np.copyto(hu, AIR_HU, where=padding)
        highest = float(hu.max())
    if not highest <= HIGHEST_HU:
        raise errors.CorruptFile(
            file.path, f"values up to {highest:g} HU, beyond any scanner's", "export it again; its header misreads them"
        )
    return lowest


def _padding_range(declared: tuple[float, float], dtype: np.dtype) -> tuple[int, int]:
    limits = np.iinfo(dtype)

    def fitted(number: int) -> int:
        # Writers store the signed -2000 as the unsigned 63536 and the other way round.
        span = 1 << limits.bits
        return number if limits.min <= number <= limits.max else (number - limits.min) % span + limits.min

    first, last = (fitted(int(number)) for number in declared)
    return min(first, last), max(first, last)


def _line(error: Exception) -> str:
    """The first line of a library's message, short enough for one of ours."""
    lines = str(error).strip().splitlines()
    return printable(lines[0] if lines else type(error).__name__)[:120]
