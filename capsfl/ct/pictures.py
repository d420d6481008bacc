"""The pictures of one patient on disk: a Zarr 3 group, checksummed, written whole or not at all.

Slices from PNG and JPEG collections are windowed by whoever published them: grey values, not Hounsfield units. They
are kept apart from volumes by their format, so that nobody takes one for the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from capsfl.ct.errors import CorruptVolume
from capsfl.ct.zarr_group import Place, StoredArray, checksum, parse_place, read_group, read_record, write_group

FORMAT = "capsfl-pictures"
VERSION = 1


@dataclass(frozen=True, eq=False)
class PictureSet:
    """Grey pictures of one patient, not Hounsfield units."""

    pixels: np.ndarray
    """(n, side, side) uint8 grey."""
    original_sizes: np.ndarray
    """(n, 2) int32 heights and widths of the files in pixels, for the control that classifies by them alone."""


def write_pictures(path: Place, pictures: PictureSet, *, attributes: Mapping[str, Any]) -> None:
    """Write the pictures of a patient as a Zarr 3 group: `pixels` uint8, `original_sizes` int32.

    Args:
        path: the group's folder or URL; replaced if it exists.
        pictures: at least one picture.
        attributes: JSON values kept with them; `checksum` is ours.

    Raises:
        StorageError: the place is read-only or full; nothing half-written is left.
        ValueError: the arrays do not belong together, or the attributes hold `checksum`.
    """
    if "checksum" in attributes:
        raise ValueError("attributes.checksum: the pictures' own key; use another name")
    pixels, sizes = np.asarray(pictures.pixels), np.asarray(pictures.original_sizes)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[1] != pixels.shape[2] or not len(pixels):
        raise ValueError(f"pixels: {pixels.dtype} {pixels.shape}; expected uint8 (n, side, side)")
    if sizes.shape != (len(pixels), 2) or not np.issubdtype(sizes.dtype, np.integer):
        raise ValueError(f"original_sizes: {sizes.dtype} {sizes.shape}; expected integers ({len(pixels)}, 2)")
    arrays = {
        "pixels": StoredArray(np.ascontiguousarray(pixels), ("picture", "y", "x")),
        "original_sizes": StoredArray(np.ascontiguousarray(sizes, np.int32), ("picture", "side")),
    }
    record = {"format": FORMAT, "version": VERSION, "attributes": dict(attributes)}
    write_group(path, arrays, record=record)


def read_pictures(path: Place) -> tuple[PictureSet, dict[str, Any]]:
    """Read the pictures of a patient and their attributes (with `checksum` added), after checking the content.

    Raises:
        CorruptVolume: absent, incomplete, damaged, a volume, or of another format version.
    """
    names = ["pixels", "original_sizes"]
    record, arrays = read_group(path, lambda _: names, format=FORMAT, versions=(VERSION,))
    if checksum(arrays) != record["checksum"]:
        raise CorruptVolume(parse_place(path), "the checksum does not match", "delete it and ingest the scan again")
    attributes = {**record["attributes"], "checksum": record["checksum"]}
    return PictureSet(arrays["pixels"], arrays["original_sizes"]), attributes


def read_picture_attributes(path: Place) -> dict[str, Any]:
    """Read the attributes of a patient's pictures (with `checksum` added) without the pictures.

    Raises:
        CorruptVolume: absent, incomplete, a volume, or of another format version.
    """
    record = read_record(path, format=FORMAT, versions=(VERSION,))
    return {**record["attributes"], "checksum": record["checksum"]}
