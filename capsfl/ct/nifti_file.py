"""A NIfTI file in bounded memory: its header says how much to unpack, and no byte more is unpacked."""

import gzip
import io
import zlib
from pathlib import Path
from typing import IO, cast

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError

from capsfl.ct import errors

GZIP = b"\x1f\x8b"
HEADER_BYTES = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
"""First number of a file, in its own byte order, and what it heads (nifti1.h, nifti2.h)."""
LARGEST_RATIO = 1032
"""Deflate packs no tighter than this (zlib's technical notes): a header that promises more lies."""
LARGEST_EXTENSION = 1 << 24
"""Bytes between the header and the voxels; extensions hold text."""
PIECE_VOXELS = 1 << 20
MILLIMETRES = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}


def load_nifti(path: Path, *, max_voxels: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the one volume of a NIfTI file, scaled, and its affine.

    Returns:
        (k, j, i) float32, and the (4, 4) map of (i, j, k, 1) to RAS mm.

    Raises:
        WrongFormat: not NIfTI, not one volume, or without geometry.
        CorruptFile: the file is truncated, or holds more than its header says.
        TooLarge: more than `max_voxels`, refused before any is read.
        InconsistentGeometry: qform and sform contradict each other.
    """
    if not path.is_file():
        raise errors.WrongFormat(path, "no such file", "check the path")
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == GZIP
            raw.seek(0)
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw) if packed else raw)
            header, offset = _read_header(path, stream)
            shape, dtype = _layout(path, header, max_voxels)
            affine = _affine(path, header)
            size, needed = path.stat().st_size, offset + int(np.prod(shape)) * dtype.itemsize
            if needed > (size * LARGEST_RATIO if packed else size):
                raise _truncated(path)
            _skip(path, stream, offset - len(header.binaryblock))
            values = _read_voxels(path, stream, shape, dtype, _scale(path, header))
            if stream.read(1):  # at its end a .gz also proves its checksum
                raise errors.CorruptFile(path, "it holds more than its header says", "convert the scan again")
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise errors.Unreadable(path, f"cannot be read ({error.strerror})", "check its permissions") from error
        raise _truncated(path) from error
    return values, affine


def _read_header(path: Path, stream: IO[bytes]) -> tuple[nibabel.Nifti1Header, int]:
    """The header, and the offset of the first voxel in bytes."""
    refusal = errors.WrongFormat(path, "not a readable NIfTI file", "give a .nii or .nii.gz file")
    try:
        start = stream.read(4)
        for order in ("little", "big"):
            length = int.from_bytes(start, order)
            if length in HEADER_BYTES:
                break
        else:
            raise refusal
        block = start + stream.read(length - 4)
        header = HEADER_BYTES[length].from_fileobj(io.BytesIO(block), endianness=order, check=False)
        offset = float(header["vox_offset"])
        magic = bytes(header["magic"].item())
    except (OSError, EOFError, zlib.error, HeaderDataError, ValueError) as error:
        raise refusal from error
    if not magic.startswith((b"n+1", b"n+2")):
        raise errors.WrongFormat(path, "header and voxels in two files, or no NIfTI", "convert it to .nii.gz")
    if offset == 0:
        offset = length + 4.0
    if not (length + 4 <= offset <= LARGEST_EXTENSION and offset == int(offset)):
        raise errors.WrongFormat(path, f"voxels that start at byte {offset:g}", "convert the scan again")
    return header, int(offset)


def _layout(path: Path, header: nibabel.Nifti1Header, max_voxels: int) -> tuple[tuple[int, int, int], np.dtype]:
    """Shape (k, j, i) and stored type."""
    count = int(header["dim"][0])
    shape = tuple(int(size) for size in header["dim"][1 : count + 1]) if 1 <= count <= 7 else ()
    if len(shape) < 3 or any(size != 1 for size in shape[3:]) or min(shape) < 1:
        raise errors.WrongFormat(path, f"shape {shape}", "give one three-dimensional volume")
    if shape[0] * shape[1] * shape[2] > max_voxels:
        raise errors.TooLarge(
            path, f"{shape[0]} x {shape[1]} x {shape[2]} voxels", f"raise reader.max_voxels = {max_voxels}"
        )
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise errors.WrongFormat(path, f"unknown type of voxels ({error})", "store it as int16 or float32") from error
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise errors.WrongFormat(path, f"voxels of type {dtype.name}, no plain numbers", "store it as int16 or float32")
    return (shape[2], shape[1], shape[0]), dtype


def _scale(path: Path, header: nibabel.Nifti1Header) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if np.isnan(slope):  # how nibabel writes that there is none
        return 1.0, 0.0
    if np.isinf(slope) or (slope and not np.isfinite(intercept)):
        raise errors.WrongFormat(path, f"unusable scale {slope:g}, {intercept:g}", "store the scan without one")
    return (slope, intercept) if slope else (1.0, 0.0)  # nifti1.h: a slope of zero means that there is none


def _affine(path: Path, header: nibabel.Nifti1Header) -> np.ndarray:
    """(i, j, k, 1) to RAS mm, from the scanner's form where the two forms speak of different spaces."""
    try:
        sform, sform_code = header.get_sform(coded=True)
        qform, qform_code = header.get_qform(coded=True)
        factor = MILLIMETRES[str(header.get_xyzt_units()[0])]
    except (HeaderDataError, ValueError, KeyError) as error:
        raise errors.WrongFormat(path, f"unusable orientation or units ({error})", "set the orientation") from error
    if sform is None and qform is None:
        raise errors.WrongFormat(
            path, "neither sform nor qform is set, so left and right are unknown", "set the orientation"
        )
    if sform is None or qform is None:
        affine = qform if sform is None else sform
    else:
        affine = qform if qform_code == 1 and sform_code != 1 else sform
        if sform_code == qform_code:
            _compare_forms(path, header, sform, qform)
    affine = np.array(affine, np.float64)
    affine[:3] *= factor
    return affine


def _compare_forms(path: Path, header: nibabel.Nifti1Header, sform: np.ndarray, qform: np.ndarray) -> None:
    last = np.array(header["dim"][1:4], np.float64) - 1
    corners = np.array([[i, j, k, 1.0] for i in (0, last[0]) for j in (0, last[1]) for k in (0, last[2])])
    apart = float(np.linalg.norm(((sform - qform) @ corners.T)[:3], axis=0).max())
    if not apart <= float(np.linalg.norm(sform[:3, :3], axis=0).min()):
        raise errors.InconsistentGeometry(
            path, f"sform and qform put the scan up to {apart:.1f} mm apart", "set both to the same orientation"
        )


def _skip(path: Path, stream: IO[bytes], count: int) -> None:
    if len(stream.read(count)) < count:
        raise _truncated(path)


def _read_voxels(
    path: Path, stream: IO[bytes], shape: tuple[int, int, int], dtype: np.dtype, scale: tuple[float, float]
) -> np.ndarray:
    """The voxels as float32, a piece in memory at a time beside them."""
    values = np.empty(shape, np.float32)
    flat = values.reshape(-1)
    # Integers of two bytes are exact in float32; wider ones are scaled before they are rounded.
    wide = np.float32 if dtype.itemsize <= 2 else np.float64
    slope, intercept = (wide(number) for number in scale)
    for at in range(0, flat.size, PIECE_VOXELS):
        wanted = min(PIECE_VOXELS, flat.size - at)
        piece = stream.read(wanted * dtype.itemsize)
        if len(piece) < wanted * dtype.itemsize:
            raise _truncated(path)
        numbers = np.frombuffer(piece, dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is no Hounsfield unit, and is refused
            flat[at : at + wanted] = numbers if scale == (1.0, 0.0) else numbers.astype(wide) * slope + intercept
    return values


def _truncated(path: Path) -> errors.CorruptFile:
    return errors.CorruptFile(path, "truncated or damaged: the voxels cannot be read", "copy the file again")
